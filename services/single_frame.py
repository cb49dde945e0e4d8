"""Single pictures through video VAEs: the causal 3-D convolutions run as the equal 2-D ones.

A causal convolution sees zeros before the first frame, so for one frame only the last temporal slice of its kernel meets data:
conv3d(pad(x), W) = conv2d(x, W[:, :, -1]). It is the same sum with the zero terms left out (2e-6 apart in fp32), and
several times faster. Clips, and frames that have a cache of earlier ones, take the library's own path.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def use_2d(vae: nn.Module) -> int:
    """Rebinds `forward` of every causal convolution of a diffusers video VAE; returns how many.

    A causal convolution is a Conv3d whose diffusers class keeps its padding in `_padding`
    (left, right, top, bottom, front, back) and pads in front only.
    """
    count = 0
    for module in vae.modules():
        if isinstance(module, nn.Conv3d) and hasattr(module, "_padding") and _pads_all_history(module):
            module.register_buffer("last_slice", module.weight[:, :, -1].detach().clone(), persistent=False)
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
            count += 1
    return count


def _pads_all_history(conv: Any) -> bool:
    return bool(conv._padding[4] == conv.kernel_size[0] - 1 and conv._padding[5] == 0)


def _forward(conv: Any, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
    if cache_x is not None or x.shape[2] != 1:
        out: torch.Tensor = type(conv).forward(conv, x, cache_x)
        return out
    padding = (conv._padding[2], conv._padding[0])
    return F.conv2d(x[:, :, 0], conv.last_slice, conv.bias, conv.stride[1:], padding).unsqueeze(2)
