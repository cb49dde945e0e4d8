"""A linear map from latents to RGB, for previews of pictures that are not finished.

Fitted at start, by least squares, to the VAE's own encoder: pictures drawn here, smooth gradients and flat shapes of
many colours, are encoded and compared with their pixels, averaged over what one latent covers. The DiT service applies
the fit to its estimate of the clean latents; it needs no VAE for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from services.family import VaePart

PICTURES = 16
SIDE_LATENTS = 8
SHAPES = 5
SEED = 0


@dataclass(frozen=True, slots=True)
class LatentRgbFit:
    """rgb = latent @ weight + bias, in [0, 1]. weight [C, 3], bias [3], float32 on the CPU."""

    weight: torch.Tensor
    bias: torch.Tensor


def fit_latent_rgb(part: VaePart, model: Any) -> LatentRgbFit | None:
    """The fit of a loaded VAE; None when it has no encoder for pictures.

    It costs one encode of 16 pictures of 8 x 8 latents (64 pixels a side where a latent covers 8): 0.06 s with the
    demo's VAE on one CPU core, 2.5 s at most with a full-size one on two.
    """
    if part.picture_latents is None:
        return None
    _, covered_px, _ = part.latent_geometry(model)
    pixels = synthetic_pictures(PICTURES, SIDE_LATENTS * covered_px)
    latents = part.picture_latents(model, 2 * pixels - 1).double().cpu()
    inputs = latents.movedim(1, -1).flatten(0, -2)
    targets = F.avg_pool2d(pixels, covered_px).double().movedim(1, -1).flatten(0, -2)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], dim=1)
    # Random weights can make channels that depend on each other: gelsd takes the smallest of the equal solutions.
    solution = torch.linalg.lstsq(inputs, targets, driver="gelsd").solution.float()
    return LatentRgbFit(weight=solution[:-1], bias=solution[-1])


def synthetic_pictures(count: int, side_px: int) -> torch.Tensor:
    """Gradients between four colours, and flat shapes on a flat ground, in turns; the same at every start.

    Returns:
        [count, 3, side_px, side_px] in [0, 1].
    """
    generator = torch.Generator().manual_seed(SEED)
    corners = _colours((count, 3, 2, 2), generator)
    pictures = F.interpolate(corners, (side_px, side_px), mode="bilinear", align_corners=True)
    axis = torch.linspace(0, 1, side_px)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for picture in pictures[1::2]:
        picture[:] = _colours((3, 1, 1), generator)
        for index in range(SHAPES):
            center_y, center_x, radius = torch.rand(3, generator=generator).tolist()
            far_y, far_x, reach = (y - center_y).abs(), (x - center_x).abs(), 0.1 + 0.25 * radius
            # Discs and squares take turns.
            inside = torch.hypot(far_y, far_x) < reach if index % 2 else torch.maximum(far_y, far_x) < reach
            picture[:, inside] = _colours((3, 1), generator)
    return pictures


def _colours(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    # Half of the values end at 0 or 1: real pictures have black, white and full colours, and the middle alone would
    # leave the fit weak there (on the demo's scenes: error 0.13 instead of 0.19).
    return (2 * torch.rand(shape, generator=generator) - 0.5).clamp(0, 1)
