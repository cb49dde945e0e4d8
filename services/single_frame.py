"""Single pictures through video VAEs: the causal 3-D convolutions run as the equal 2-D ones, without a frame cache.

A causal convolution sees zeros before the first frame, so for one frame only the last temporal slice of its kernel
meets data: conv3d(pad(x), W) = conv2d(x, W[:, :, -1]). It is the same sum with the zero terms left out (2e-6 apart in
fp32), and fourteen times faster with weights in channels_last order (256x256, two CPU cores). The library also keeps
every convolution's input for the frames to come; a single picture has none, so these copies and their memory are saved.
Clips take the library's own path, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(slots=True)
class Work:
    """What a VAE does now; shared by its convolutions."""

    one_frame: bool = False


def use_2d(vae: Any) -> int:
    """Rebinds the methods of a diffusers video VAE (AutoencoderKLQwenImage, AutoencoderKLWan) for single frames.

    A causal convolution is a Conv3d whose diffusers class keeps its padding in `_padding`
    (left, right, top, bottom, front, back) and pads in front only.

    Returns:
        How many convolutions have a 2-D form now.
    """
    work = Work()
    causal = [
        module
        for module in vae.modules()
        if isinstance(module, nn.Conv3d) and hasattr(module, "_padding") and _pads_all_history(module)
    ]
    for conv in causal:
        _give_2d_weight(conv, conv.weight[:, :, -1], work, _convolve_last_slice)
    if causal:
        # One layout through the whole VAE: nothing is reordered between its convolutions.
        for module in vae.modules():
            if isinstance(module, nn.Conv2d):
                _give_2d_weight(module, module.weight, work, _convolve)
        vae.work = work
        for name, method in (("_encode", _encode), ("_decode", _decode), ("clear_cache", _clear_cache)):
            _rebind(vae, name, method)
    return len(causal)


def _give_2d_weight(conv: Any, weight: torch.Tensor, work: Work, forward: Any) -> None:
    kernel = weight.detach().contiguous(memory_format=torch.channels_last)
    conv.register_buffer("weight_2d", kernel, persistent=False)
    conv.work = work
    _rebind(conv, "forward", forward)


def _rebind(module: Any, name: str, method: Any) -> None:
    setattr(module, name, MethodType(method, module))


def _pads_all_history(conv: Any) -> bool:
    return bool(conv._padding[4] == conv.kernel_size[0] - 1 and conv._padding[5] == 0)


def _convolve_last_slice(conv: Any, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
    if not conv.work.one_frame:
        out: torch.Tensor = type(conv).forward(conv, x, cache_x)
        return out
    padding = (conv._padding[2], conv._padding[0])
    return F.conv2d(x[:, :, 0], conv.weight_2d, conv.bias, conv.stride[1:], padding).unsqueeze(2)


def _convolve(conv: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = conv._conv_forward(x, conv.weight_2d if conv.work.one_frame else conv.weight, conv.bias)
    return out


def _encode(vae: Any, x: torch.Tensor) -> Any:
    vae.work.one_frame = x.shape[2] == 1
    return type(vae)._encode(vae, x)


def _decode(vae: Any, z: torch.Tensor, return_dict: bool = True) -> Any:
    vae.work.one_frame = z.shape[2] == 1
    return type(vae)._decode(vae, z, return_dict)


def _clear_cache(vae: Any) -> None:
    # The library calls this before every picture, clip and tile. Without a list, its layers keep nothing.
    type(vae).clear_cache(vae)
    if vae.work.one_frame:
        vae._feat_map = vae._enc_feat_map = None
