"""What a VAE does between its convolutions, in plain torch: formulas, and what a compiler fuses.

`vae_kernels_cuda` has the same functions as single kernels; `kernels_for` says which of the two modules to take.
Shapes: [B, C, H, W] or [B, C, F, H, W]. A bias is that of the convolution before, one number for each channel. Moments,
roots and SiLU are taken in float32.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Means and variances [2, ...] of a piece to those of all pieces [n, 2, ...] and each piece's share in the whole.
Gather = Callable[[torch.Tensor], tuple[torch.Tensor, tuple[float, ...]]]


def kernels_for(x: torch.Tensor) -> Any:
    """Triton's kernels on a GPU; plain torch on the CPU, and for a compiler, which fuses it itself."""
    if not x.is_cuda or torch.compiler.is_compiling() or not has_compiler():
        return sys.modules[__name__]
    # Imported where it is used: builds of torch without CUDA come without Triton.
    from services import vae_kernels_cuda

    return vae_kernels_cuda


@cache
def has_compiler() -> bool:
    """For Triton, which builds what starts its kernels."""
    return any(map(shutil.which, ("gcc", "clang")))


def rms_norm_silu(x: torch.Tensor, bias: torch.Tensor | None, gamma: torch.Tensor, out: torch.Tensor) -> None:
    """SiLU of a clip's RMS norm over channels.

    Args:
        gamma: [C].
        x: [B, C, F, H, W].
        out: of x's shape, channels last; may be a part of something larger.
    """
    whole = _with_bias(x, bias).float()
    normed = F.normalize(whole, dim=1) * (channels(gamma, x).float() * gamma.numel() ** 0.5)
    out.copy_(F.silu(normed))


def group_norm_silu(
    x: torch.Tensor, bias: torch.Tensor | None, norm: nn.GroupNorm, out: torch.Tensor, gather: Gather | None = None
) -> None:
    """SiLU of a group norm by way of each channel's own moments, which loses no digits.

    Args:
        x: [B, C, H, W].
        out: of x's shape, channels last; may be a part of something larger.
        gather: where x is a piece of what the norm is of.
    """
    whole = _with_bias(x, bias).float()
    variance, mean = torch.var_mean(whole, dim=(2, 3), correction=0)
    variance, mean = (moments.unflatten(1, (norm.num_groups, -1)) for moments in (variance, mean))
    own = torch.stack([mean.mean(2), variance.mean(2) + mean.var(2, correction=0)])
    mean, variance = together(*(gather(own) if gather else (own[None], (1.0,))))
    width = x.shape[1] // norm.num_groups
    scale = (variance + norm.eps).rsqrt().repeat_interleave(width, 1) * norm.weight
    shift = norm.bias - mean.repeat_interleave(width, 1) * scale
    out.copy_(F.silu(whole * scale[:, :, None, None] + shift[:, :, None, None]))


def together(moments: torch.Tensor, shares: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of a whole from those of its pieces (Chan et al.).

    Args:
        moments: means and variances [n, 2, ...].
        shares: of the pieces in the whole.
    """
    means, variances = moments.unbind(1)
    share = torch.tensor(shares, device=moments.device).view(-1, *(1 for _ in means.shape[1:]))
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean) ** 2)).sum(0)


def add(shortcut: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What leaves a residual block: shortcut + x + bias."""
    return shortcut + _with_bias(x, bias)


def double(x: torch.Tensor, out: torch.Tensor) -> None:
    """Each pixel of [B, C, H, W] four times.

    Args:
        out: [B, C, 2 H, 2 W], channels last; may be a part of something larger.
    """
    out.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).copy_(x[:, :, :, None, :, None])


def side_by_side(clip: torch.Tensor, count: int) -> torch.Tensor:
    """Each frame of [B, C, F + count - 1, H, W] with those behind it: [B F, count C, H, W], channels last."""
    frames = clip.shape[2] - count + 1
    if count > 1:
        clip = torch.cat([clip[:, :, start : start + frames] for start in range(count)], dim=1)
    return clip.transpose(1, 2).flatten(0, 1)


def softmax(scores: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Of each row of scores [N, M] in float32, times `scale`."""
    return (scores * scale).softmax(-1).to(dtype)


def channels(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One number for each channel of [B, C, ...]."""
    return weights.view(-1, *(1 for _ in x.shape[2:]))


def _with_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x + channels(bias, x)
