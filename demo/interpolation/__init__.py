"""How the checkpoint of the frame interpolator is trained and judged."""
