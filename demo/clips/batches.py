"""Scenes in motion as tensors, painted in batches on any device by the formulas of demo.clips.scenes.

Called by training only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from demo.clips.scenes import PATHS, SIDE_PX, SIZES_PX, SPEEDS_PX, UNIT_TRACKS, MovingScene
from demo.scenes import PALETTE, SHAPES, signed_distance


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
        unit = torch.from_numpy(UNIT_TRACKS).to(self.x)[self.path]
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
