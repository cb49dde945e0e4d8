"""The demo model: drawn scenes, their captions, a scorer, and the checkpoint trained on them."""
