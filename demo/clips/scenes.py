"""Scenes in motion: one flat shape that crosses a plain background, straight on or with one turn.

Called by the captions, the scorer, training and the tests of clips. Shapes and colours are those of demo.scenes. It
knows no model and no text.

Coordinates are pixels, x to the right and y down; a clip has 33 frames of 128x128 pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from demo.scenes import PALETTE, SHAPES, signed_distance

NUM_FRAMES = 33
SIDE_PX = 128
MARGIN_PX = 4
"""Free pixels between the object's reach and the border, in every frame."""
FPS = 16.0

SIZES_PX = {"small": 24.0, "large": 32.0}
"""Radius of each size in pixels; the points of a star of 15 px are lost between latents that are 8 px apart."""
SPEEDS_PX = {"slow": 0.8, "fast": 1.6}
"""Pixels a frame."""
HEADINGS = ("right", "lower right", "down", "lower left", "left", "upper left", "up", "upper right")
"""Eighths of a turn, clockwise on the screen."""
TURN_FRAMES = (12, 20)
"""A turn begins at the first of these frames and is done at the second."""


@dataclass(frozen=True, slots=True)
class Path:
    """The heading before the turn and after it; the same twice for a straight path."""

    first: str
    second: str

    @property
    def name(self) -> str:
        return self.first if self.first == self.second else f"{self.first} then {self.second}"


def _paths() -> tuple[Path, ...]:
    """Eight straight ones, and the eight right-angled turns between right, down, left and up."""
    straight = [Path(heading, heading) for heading in HEADINGS]
    turns = [Path(HEADINGS[i], HEADINGS[(i + by) % 8]) for i in range(0, 8, 2) for by in (2, 6)]
    return tuple(straight + turns)


PATHS = _paths()


@dataclass(frozen=True, slots=True)
class MovingScene:
    """One object of a colour that is not the background's; `x` and `y` are its centre in the first frame."""

    shape: str
    colour: str
    background: str
    size: str
    path: Path
    speed: str
    x: float
    y: float


def unit_track(path: Path) -> NDArray[np.float64]:
    """Centres (33, 2) of an object that starts at (0, 0) and covers one pixel a frame, turning evenly."""
    first, second = (HEADINGS.index(heading) * math.pi / 4 for heading in (path.first, path.second))
    turn = (second - first + math.pi) % (2 * math.pi) - math.pi
    begin, end = TURN_FRAMES
    angle = first + turn * np.clip((np.arange(NUM_FRAMES - 1) + 0.5 - begin) / (end - begin), 0.0, 1.0)
    steps = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.concatenate([np.zeros((1, 2)), steps.cumsum(axis=0)])


UNIT_TRACKS = np.stack([unit_track(path) for path in PATHS])
"""The track of every path, (16, 33, 2)."""


def track(scene: MovingScene) -> NDArray[np.float64]:
    """The object's centre in every frame, (33, 2)."""
    centres: NDArray[np.float64] = UNIT_TRACKS[PATHS.index(scene.path)] * SPEEDS_PX[scene.speed] + (scene.x, scene.y)
    return centres


def sample_moving_scene(rng: Random, shapes: Sequence[str] = SHAPES) -> MovingScene:
    """A random scene whose object stays inside the picture all the time.

    Args:
        shapes: what is drawn from; a shape that is listed twice comes twice as often.
    """
    colour, background = rng.sample(list(PALETTE), 2)
    size, speed, path = rng.choice(list(SIZES_PX)), rng.choice(list(SPEEDS_PX)), rng.choice(PATHS)
    moved = UNIT_TRACKS[PATHS.index(path)] * SPEEDS_PX[speed]
    reach = SIZES_PX[size] * 1.05 + MARGIN_PX
    low, high = reach - moved.min(axis=0), SIDE_PX - reach - moved.max(axis=0)
    x, y = (rng.uniform(float(low[axis]), float(high[axis])) for axis in range(2))
    return MovingScene(rng.choice(shapes), colour, background, size, path, speed, x, y)


def draw_clip(scene: MovingScene) -> NDArray[np.uint8]:
    """The clip with anti-aliased edges; shape (33, 128, 128, 3), values 0..255."""
    centres = np.arange(SIDE_PX) + 0.5
    at, radius = track(scene)[:, :, None, None], SIZES_PX[scene.size]
    x, y = (centres[None, None, :] - at[:, 0]) / radius, (centres[None, :, None] - at[:, 1]) / radius
    coverage = np.clip(0.5 - signed_distance(scene.shape, x, y, np) * radius, 0.0, 1.0)[..., None]
    object_colour, background = (np.array(PALETTE[name], np.float64) for name in (scene.colour, scene.background))
    clip: NDArray[np.uint8] = np.rint(background * (1.0 - coverage) + object_colour * coverage).astype(np.uint8)
    return clip
