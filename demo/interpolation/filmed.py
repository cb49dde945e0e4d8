"""What films have and drawings have not: light that changes, noise, and what a codec leaves out.

Where light changes or a codec rounds, the two ends of a pair differ although they are well aligned; a network that
never saw that takes the difference for motion, or for something hidden.

Letters of shapes: N clips, S the picture's side in pixels, a multiple of 8.
"""

from __future__ import annotations

import math

import torch

BLOCK_PX = 8
MAX_DRIFT = 0.06
"""Of brightness, from the first picture to the second: rarely more between every second frame of a film."""
MAX_NOISE = 0.012
"""Deviation, in films from a camera; cubed, so that most have little."""
MAX_ROUNDING = 0.08
"""A codec's steps, of brightness: 20 of 255, those of H.264 at a quantiser of 30."""


def filmed(
    first: torch.Tensor, wanted: torch.Tensor, second: torch.Tensor, times: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three pictures [N, 3, S, S] in [0, 1] of times 0, `times` [N] and 1, as a film has them.

    The wanted one has no noise, which nobody could foretell, but is as poor in detail as the others.
    """
    drift, noise, rounding, coded = torch.rand(4, len(times), 1, 1, 1, generator=generator, device=first.device)
    drift, noise = MAX_DRIFT * (2 * drift - 1).pow(3), MAX_NOISE * noise.pow(3)
    rounding = MAX_ROUNDING * rounding.pow(2)
    late = times.view(-1, 1, 1, 1)
    first, second = first * (1 - drift * late), second * (1 + drift * (1 - late))
    first, second = (x + noise * torch.randn(x.shape, generator=generator, device=x.device) for x in (first, second))
    first, wanted, second = (
        torch.where(coded < 0.5, rounded(x, rounding), x).clamp(0, 1) for x in (first, wanted, second)
    )
    return first, wanted, second


def rounded(pictures: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 3, S, S] whose 8x8 cosine transforms are multiples of steps [N, 1, 1, 1], above 0."""
    basis = cosines().to(pictures)
    blocks = pictures.unfold(2, BLOCK_PX, BLOCK_PX).unfold(3, BLOCK_PX, BLOCK_PX)
    steps = steps[..., None, None].clamp(min=1e-4)
    waves = ((basis @ blocks @ basis.T) / steps).round() * steps
    return (basis.T @ waves @ basis).transpose(3, 4).reshape(pictures.shape)


def cosines() -> torch.Tensor:
    """The rows are the 8 cosines of the orthonormal transform (DCT-II)."""
    place = torch.arange(BLOCK_PX, dtype=torch.float64)
    waves = torch.cos(math.pi / BLOCK_PX * (place + 0.5) * place[:, None])
    waves[0] /= math.sqrt(2)
    return (waves * math.sqrt(2 / BLOCK_PX)).float()
