"""How large a request is: the one measure of queues, quotas and paces. Known before anything runs.

A pixel-step is one pixel of one frame in one denoising step. Tokens are pixels, by a factor that each model has.
"""

from __future__ import annotations

from typing import Protocol

from services.request import Limits, ResolvedParams

MEGA = 1e6


class Size(Protocol):
    """What a request's parameters say of its size, in whatever form they are."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def num_frames(self) -> int: ...

    @property
    def steps(self) -> int: ...


def pixels(params: Size) -> int:
    """Pixels of all frames."""
    return params.width * params.height * max(1, params.num_frames)


def pixel_steps(params: Size) -> int:
    """Pixels of all frames, times steps."""
    return pixels(params) * params.steps


def megapixel_steps(params: Size) -> float:
    """What quotas count: width * height * frames * steps / 10^6."""
    return pixel_steps(params) / MEGA


def cost_of(params: ResolvedParams, limits: Limits) -> float:
    """What a request takes of a denoiser: megapixel-steps, times the guidance branches of each step."""
    return megapixel_steps(params) * branches(params, limits)


def branches(params: ResolvedParams, limits: Limits) -> int:
    """How often each step calls the model: 2 with guidance, else 1."""
    # With a guidance of another kind, the first is an input of the model and takes no branch.
    scales = (params.guidance_2,) if limits.separate_guidance_2 else (params.guidance, params.guidance_2)
    return 2 if max(scales) > 1.0 else 1
