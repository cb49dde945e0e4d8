"""The frame interpolation stage."""
