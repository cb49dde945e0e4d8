"""A VAE's layers as a GPU likes them; nothing here changes what they compute, but for the last bits.

weights        channels last, so that convolutions run on tensor cores without reordering what goes through them
norms          with the SiLU behind them as one compiled kernel, which reads and writes a picture once
biases         of a residual block's convolutions added by the kernel that reads their result next
group norms    moments of each channel first, then of its group: rows of channels are read as they lie
upsampling     in the picture's own dtype and layout: nearest neighbours are copies, which no dtype makes better

Without these, three quarters of a decode at 1024x1024 went to what is not a convolution (FLUX, H100).
"""

from __future__ import annotations

import shutil
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import nn

# What modules call the activation behind their own norms.
ACTIVATIONS = ("nonlinearity", "conv_act")
# Graphs of a norm, in all: one for each number of channels, and another for single frames.
RECOMPILE_LIMIT = 256
COMPILERS = ("gcc", "g++", "clang", "clang++")


def speed_up(vae: nn.Module) -> None:
    """All of the above, on a loaded VAE whose layers may have been rebound for ranks already.

    Where there is no C compiler, only the weights change their layout, and upsampling its dtype.
    """
    channels_last(vae)
    if any(map(shutil.which, COMPILERS)):
        settings: Any = torch._dynamo.config
        settings.recompile_limit = max(settings.recompile_limit, RECOMPILE_LIMIT)
        fuse_blocks(vae)
        fuse_norms(vae)
        double = torch.compile(_double, fullgraph=True, dynamic=True)
    else:
        double = _double
    for module in vae.modules():
        layer: Any = module
        if isinstance(module, nn.Upsample) and module.mode.startswith("nearest") and _twice(module.scale_factor):
            layer.forward = double
        elif (
            isinstance(module, Upsample2D) and module.interpolate and not module.use_conv_transpose and not module.norm
        ):
            layer.forward = MethodType(_double_and_convolve, module)
            layer.double = double


def channels_last(vae: nn.Module) -> None:
    """Weights of convolutions with the channels innermost; what goes through them follows."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def fuse_blocks(vae: nn.Module) -> int:
    """Residual blocks of two norms and two convolutions, of both kinds of VAEs.

    Returns:
        How many there are.
    """
    fused = Fused()
    blocks: list[Any] = [module for module in vae.modules() if _is_residual(module)]
    for block in blocks:
        block.biases = [conv.bias for conv in (block.conv1, block.conv2)]
        block.conv1.bias = block.conv2.bias = None
        block.fused = fused
        block.forward = MethodType(_run_block, block)
    return len(blocks)


class Fused:
    """What is one kernel in residual blocks, compiled once for all of them."""

    def __init__(self) -> None:
        self.normed: Any = torch.compile(_normed, fullgraph=True, dynamic=True)
        self.add: Any = torch.compile(_add, fullgraph=True, dynamic=True)

    def convolve(self, norm: Any, conv: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """A convolution without its bias, of SiLU(norm(x + bias))."""
        if not _own_forward(norm):
            # Ranks share its moments.
            x = F.silu(norm(x if bias is None else x + channels(bias, x)))
        else:
            x = self.normed(norm, x, bias)
        convolved: torch.Tensor = conv(x)
        return convolved


def _run_block(block: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
    first, second = block.biases
    hidden = block.fused.convolve(block.norm1, block.conv1, x, None)
    hidden = block.fused.convolve(block.norm2, block.conv2, hidden, first)
    out: torch.Tensor = block.fused.add(shortcut, hidden, second)
    return out


def _is_residual(module: Any) -> bool:
    """Whether a module adds conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))) to what comes in, and does nothing else."""
    if not all(hasattr(module, name) for name in ("norm1", "conv1", "norm2", "conv2", "nonlinearity", "conv_shortcut")):
        return False
    others = [getattr(module, name, None) for name in ("time_emb_proj", "upsample", "downsample")]
    plain = getattr(module, "output_scale_factor", 1) == 1 and others == [None, None, None]
    return plain and isinstance(module.nonlinearity, nn.SiLU) and isinstance(module.conv1.bias, nn.Parameter)


def _normed(norm: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    x = x if bias is None else x + channels(bias, x)
    normed = group_norm(norm, x) if isinstance(norm, nn.GroupNorm) else type(norm).forward(norm, x)
    activated: torch.Tensor = F.silu(normed)
    return activated


def _add(shortcut: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return shortcut + (x + channels(bias, x))


def channels(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One number for each channel of [B, C, ...]."""
    return weights.view(-1, *(1 for _ in x.shape[2:]))


def group_norm(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """The norm of [B, C, H, W] by way of each channel's own moments, which loses no digits."""
    variance, mean = torch.var_mean(x.float(), dim=(2, 3), correction=0)
    variance, mean = (moments.unflatten(1, (norm.num_groups, -1)) for moments in (variance, mean))
    whole = variance.mean(2, keepdim=True) + mean.var(2, correction=0, keepdim=True)
    scale = (whole + norm.eps).rsqrt().expand_as(mean).flatten(1) * norm.weight
    shift = norm.bias - mean.mean(2, keepdim=True).expand_as(mean).flatten(1) * scale
    normed: torch.Tensor = x.float() * scale[:, :, None, None] + shift[:, :, None, None]
    return normed.to(x.dtype)


def fuse_norms(vae: nn.Module) -> int:
    """All other norms take along the SiLU that follows them. Those that ranks share (their forward is not their
    class's) stay.

    Returns:
        How many norms have one now.
    """
    compiled: Any = torch.compile(_normed, fullgraph=True, dynamic=True)
    count = 0
    for owner in list(vae.modules()):
        if hasattr(owner, "fused"):
            continue
        for name in ACTIVATIONS:
            norms = [norm for key, norm in owner.named_children() if "norm" in key and _own_forward(norm)]
            if norms and isinstance(getattr(owner, name, None), nn.SiLU):
                for norm in norms:
                    layer: Any = norm
                    layer.forward = partial(compiled, norm, bias=None)
                setattr(owner, name, nn.Identity())
                count += len(norms)
    return count


def _double(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] to [B, C, 2 H, 2 W], each pixel four times, channels last."""
    rows = x.permute(0, 2, 3, 1)
    batch, height, width, count = rows.shape
    wide = rows[:, :, None, :, None].expand(batch, height, 2, width, 2, count)
    return wide.reshape(batch, 2 * height, 2 * width, count).permute(0, 3, 1, 2)


def _twice(scale: Any) -> bool:
    return all(factor == 2 for factor in (scale if isinstance(scale, tuple) else (scale,)))


def _double_and_convolve(upsample: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    x = upsample.double(x)
    if not upsample.use_conv:
        return x
    out: torch.Tensor = (upsample.conv if upsample.name == "conv" else upsample.Conv2d_0)(x)
    return out


def compile_decoder(vae: Any) -> None:
    """The whole decoder, a graph for each shape and kind of chunk; `seal` ends it."""
    torch.compiler.set_stance("default")
    vae.decoder.forward = torch.compile(vae.decoder.forward, dynamic=False)


def seal() -> None:
    """From now on shapes without a graph run eagerly: no request waits for a compiler."""
    torch.compiler.set_stance("eager_on_recompile")


def _own_forward(module: nn.Module) -> bool:
    return "forward" not in vars(module)
