"""Outlines of layers as an atlas of signed distances: the demo's shapes, smooth blobs, bars."""

from __future__ import annotations

import math

import torch

from demo.scenes import SHAPES, signed_distance

REACH = 1.6
"""The atlas shows the square from -1.6 to 1.6; an outline's own reach is about 1."""

SIDE = 128
BLOBS = 48
BARS = 8
WAVES = 5


def outline_atlas() -> torch.Tensor:
    """[O, 1, 128, 128]: negative inside, in units of the outline's radius. The first are the demo's shapes, in order.

    The same at every call.
    """
    generator = torch.Generator().manual_seed(0)
    axis = torch.linspace(-REACH, REACH, SIDE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    drawn = [signed_distance(shape, x, y, torch) for shape in SHAPES]
    drawn += [_blob(x, y, generator) for _ in range(BLOBS)]
    drawn += [_bar(x, y, generator) for _ in range(BARS)]
    return torch.stack(drawn)[:, None]


def _blob(x: torch.Tensor, y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A circle whose radius goes up and down with the angle."""
    angle = torch.atan2(y, x)
    radius = torch.full_like(x, 0.7)
    for wave in range(1, WAVES + 1):
        height, phase = torch.rand(2, generator=generator).tolist()
        radius = radius + 0.35 * (height - 0.2) / wave * torch.cos(wave * angle + 2 * math.pi * phase)
    # A steep side is nearer than it seems along the ray.
    return 0.8 * (torch.hypot(x, y) - radius.clamp(min=0.15))


def _bar(x: torch.Tensor, y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    half_width = 0.06 + 0.2 * torch.rand(1, generator=generator).item()
    return torch.maximum(x.abs() - half_width, y.abs() - 0.95)
