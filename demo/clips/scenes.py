"""Scenes in motion: one flat shape that crosses a plain background, straight on or with one turn.

Called by the captions, the scorer, training and the tests of clips. Shapes and colours are those of demo.scenes.
`draw_clip` draws one scene with numpy, `paint` batches of them with torch on any device, by the same formulas.

Coordinates are pixels, x to the right and y down; a clip has 33 frames of 128x128 pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray

from demo.scenes import PALETTE, SHAPES, signed_distance

NUM_FRAMES = 33
SIDE_PX = 128
MARGIN_PX = 4
"""Free pixels between the object's reach and the border, in every frame."""
FPS = 16.0

SIZES_PX = {"small": 15.0, "large": 22.0}
"""Radius of each size in pixels."""
SPEEDS_PX = {"slow": 0.8, "fast": 1.8}
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


_UNIT_TRACKS = np.stack([unit_track(path) for path in PATHS])


def track(scene: MovingScene) -> NDArray[np.float64]:
    """The object's centre in every frame, (33, 2)."""
    return _UNIT_TRACKS[PATHS.index(scene.path)] * SPEEDS_PX[scene.speed] + (scene.x, scene.y)


def sample_moving_scene(rng: Random) -> MovingScene:
    """A random scene whose object stays inside the picture all the time."""
    colour, background = rng.sample(list(PALETTE), 2)
    size, speed, path = rng.choice(list(SIZES_PX)), rng.choice(list(SPEEDS_PX)), rng.choice(PATHS)
    moved = _UNIT_TRACKS[PATHS.index(path)] * SPEEDS_PX[speed]
    reach = SIZES_PX[size] * 1.05 + MARGIN_PX
    low, high = reach - moved.min(axis=0), SIDE_PX - reach - moved.max(axis=0)
    x, y = (rng.uniform(float(low[axis]), float(high[axis])) for axis in range(2))
    return MovingScene(rng.choice(SHAPES), colour, background, size, path, speed, x, y)


def draw_clip(scene: MovingScene) -> NDArray[np.uint8]:
    """The clip with anti-aliased edges; shape (33, 128, 128, 3), values 0..255."""
    centres = np.arange(SIDE_PX) + 0.5
    at, radius = track(scene)[:, :, None, None], SIZES_PX[scene.size]
    x, y = (centres[None, None, :] - at[:, 0]) / radius, (centres[None, :, None] - at[:, 1]) / radius
    coverage = np.clip(0.5 - signed_distance(scene.shape, x, y, np) * radius, 0.0, 1.0)[..., None]
    object_colour, background = (np.array(PALETTE[name], np.float64) for name in (scene.colour, scene.background))
    return np.rint(background * (1.0 - coverage) + object_colour * coverage).astype(np.uint8)


@dataclass(slots=True)
class MovingBatch:
    """N scenes as numbers, (N,) each: indices of shape, colour, background and path; radius, speed, x, y in pixels."""

    shape: torch.Tensor
    colour: torch.Tensor
    background: torch.Tensor
    path: torch.Tensor
    radius: torch.Tensor
    speed: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, rows: "slice | torch.Tensor") -> "MovingBatch":
        return MovingBatch(*(getattr(self, f.name)[rows] for f in fields(self)))

    def to(self, device: torch.device) -> "MovingBatch":
        return MovingBatch(*(getattr(self, f.name).to(device) for f in fields(self)))

    def tracks(self) -> torch.Tensor:
        """Centres in every frame, (N, 33, 2)."""
        unit = torch.from_numpy(_UNIT_TRACKS).to(self.x)[self.path]
        return unit * self.speed[:, None, None] + torch.stack([self.x, self.y], dim=1)[:, None]


def batch_of(scenes: Sequence[MovingScene]) -> MovingBatch:
    """Packs scenes into tensors."""
    colours = list(PALETTE)
    indices = [
        (SHAPES.index(s.shape), colours.index(s.colour), colours.index(s.background), PATHS.index(s.path))
        for s in scenes
    ]
    numbers = [(SIZES_PX[s.size], SPEEDS_PX[s.speed], s.x, s.y) for s in scenes]
    return MovingBatch(*torch.tensor(indices).unbind(1), *torch.tensor(numbers, dtype=torch.float32).unbind(1))


def paint(scenes: MovingBatch, tracks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Paints clips as draw_clip does.

    Args:
        tracks: centres (N, F, 2) of the frames to paint.

    Returns: clips (N, 3, F, 128, 128) in [-1, 1], and weights (N, 1, F, 128, 128), high on the object and around it.
    """
    device = tracks.device
    palette = torch.tensor(list(PALETTE.values()), dtype=torch.float32, device=device) / 127.5 - 1.0
    centres = torch.arange(SIDE_PX, device=device) + 0.5
    radius = scenes.radius[:, None, None, None]
    x = (centres[None, None, None, :] - tracks[:, :, 0, None, None]) / radius
    y = (centres[None, None, :, None] - tracks[:, :, 1, None, None]) / radius
    distance = torch.full_like(x + y, 100.0)
    for index, shape in enumerate(SHAPES):
        chosen = (scenes.shape == index)[:, None, None, None]
        distance = torch.where(chosen, signed_distance(shape, x, y, torch), distance)
    distance = (distance * radius)[:, None]
    coverage = torch.clip(0.5 - distance, 0.0, 1.0)
    background, colour = (palette[rows][:, :, None, None, None] for rows in (scenes.background, scenes.colour))
    weight = 1.0 + 6.0 * torch.clip(1.0 - distance / 5.0, 0.0, 1.0)
    return background * (1 - coverage) + colour * coverage, weight
