"""The demo's video model: scenes in motion, captions, the judge of clips, training and evaluation."""
