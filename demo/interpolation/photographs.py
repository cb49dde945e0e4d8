"""The photographs that layers are cut from: those in scikit-image's wheel that are free of restrictions.

The wheel is no dependency: `pip install scikit-image==0.26.0`, or any folder with the same files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

TILE_PX = 384

TRAINING = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "clock_motion.png",
    "coins.png",
    "grass.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
)
HELD_OUT = ("chelsea.png", "coffee.png", "gravel.png", "rocket.jpg")


def read_tiles(folder: Path, names: tuple[str, ...]) -> torch.Tensor:
    """Square cuts that together cover every photograph: [T, 3, 384, 384] in [0, 1]."""
    tiles = [tile for name in names for tile in _cut(Image.open(folder / name).convert("RGB"))]
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255


def _cut(picture: Image.Image) -> list[np.ndarray]:
    side = min(picture.size)
    lefts, tops = (_starts(length, side) for length in picture.size)
    boxes = [(left, top, left + side, top + side) for top in tops for left in lefts]
    return [np.asarray(picture.resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS, box)) for box in boxes]


def _starts(length: int, side: int) -> list[int]:
    count = -(-length // side)
    return [(length - side) * index // max(1, count - 1) for index in range(count)]
