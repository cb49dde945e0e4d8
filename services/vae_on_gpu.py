"""A VAE's layers as a GPU likes them; nothing here changes what they compute, but for the last bits.

weights        channels last, so that convolutions run on tensor cores without reordering what goes through them
norms          with the SiLU behind them as one kernel, which reads a picture once and writes it to where the next
               convolution reads it: in a clip, behind the frames that the convolution remembers
biases         of a residual block's convolutions added by the kernel that reads their result next; so are those of
               convolutions behind a doubling, by the block that follows
group norms    moments of each channel first, then of its group: rows of channels are read as they lie
upsampling     in the picture's own dtype and layout: nearest neighbours are copies, which no dtype makes better;
               over ranks, into the room that the next convolution needs for its neighbours' edges

Without these, three quarters of a decode at 1024x1024 went to what is not a convolution (FLUX, H100).
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from services.causal_stream import convolve_room, remembers, room_behind_history
from services.vae_kernels import kernels_for

# What modules call their last norm, and the activation behind it.
LAST_NORMS = ("norm_out", "conv_norm_out")
ACTIVATIONS = ("nonlinearity", "conv_act")


def speed_up(vae: nn.Module) -> None:
    """All of the above, on a loaded VAE whose layers may have been rebound for ranks already."""
    channels_last(vae)
    fuse_blocks(vae)
    fuse_last_norms(vae)
    defer_biases(vae)
    for module in vae.modules():
        layer: Any = module
        if _doubles(module):
            layer.forward = _double
        elif isinstance(module, nn.Sequential) and len(layer) == 2 and _doubles(layer[0]) and _convolves(layer[1]):
            layer.forward = partial(_double_and_convolve, layer[1])
        elif isinstance(module, Upsample2D) and _interpolates(module):
            layer.forward = MethodType(_upsample, module)


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
    blocks: list[Any] = [module for module in vae.modules() if _is_residual(module)]
    for block in blocks:
        shortcut: Any = block.conv_shortcut
        block.biases = [conv.bias for conv in (block.conv1, block.conv2)]
        if isinstance(shortcut, nn.Conv2d | nn.Conv3d) and shortcut.bias is not None:
            block.biases[1] = block.biases[1] + shortcut.bias
            shortcut.bias = None
        block.conv1.bias = block.conv2.bias = None
        block.bias_before = None
        block.normed = [NormedConvolution(block.norm1, block.conv1), NormedConvolution(block.norm2, block.conv2)]
        block.forward = MethodType(_run_block, block)
    return len(blocks)


def defer_biases(vae: nn.Module) -> int:
    """Of convolutions that double a picture, to the residual block that reads their result and nobody else does.

    A block gives shortcut(x + b) + f(norm(x + b)). Its first norm adds b; what the shortcut makes of it, b itself or
    W b of a convolution of single pixels, is a constant like the last bias.

    Returns:
        How many there are.
    """
    count = 0
    for module in vae.modules():
        blocks: list[Any] = list(getattr(module, "up_blocks", ()))
        for before, behind in pairwise(blocks):
            conv = _last_convolution(getattr(before, "upsamplers", None))
            reader: Any = next(iter(getattr(behind, "resnets", ())), None)
            if conv is None or conv.bias is None or not hasattr(reader, "normed"):
                continue
            reader.bias_before, conv.bias = conv.bias.detach(), None
            reader.biases[1] = reader.biases[1] + _through(reader.conv_shortcut, reader.bias_before)
            count += 1
    return count


def _last_convolution(upsamplers: Any) -> Any:
    """That of an up block which ends with it; None where there is none."""
    layer: Any = upsamplers[-1] if upsamplers else None
    if isinstance(layer, Upsample2D):
        return layer.conv if _interpolates(layer) and layer.use_conv and layer.name == "conv" else None
    resample = getattr(layer, "resample", None)
    doubles = isinstance(resample, nn.Sequential) and len(resample) == 2 and _doubles(resample[0])
    return resample[1] if doubles and _convolves(resample[1]) else None  # type: ignore[index]


def _through(shortcut: Any, bias: torch.Tensor) -> torch.Tensor:
    """What the shortcut makes of a constant."""
    if not isinstance(shortcut, nn.Conv2d | nn.Conv3d):
        return bias
    return shortcut.weight.flatten(1) @ bias


def fuse_last_norms(vae: nn.Module) -> int:
    """The last norms of encoders and decoders, with the SiLU and the convolution that follow.

    Returns:
        How many there are.
    """
    count = 0
    for module in vae.modules():
        owner: Any = module
        norm = next((getattr(owner, name) for name in LAST_NORMS if hasattr(owner, name)), None)
        names = [name for name in ACTIVATIONS if isinstance(getattr(owner, name, None), nn.SiLU)]
        if norm is not None and names:
            # The convolution takes along what stands before it.
            owner.conv_out.forward = NormedConvolution(norm, owner.conv_out)
            norm.forward = nn.Identity().forward
            setattr(owner, names[0], nn.Identity())
            count += 1
    return count


class NormedConvolution:
    """A convolution of SiLU(norm(x + bias)).

    Everything is written to where the convolution reads it: the norm, earlier frames, over ranks neighbours' edges.

    Args:
        norm: a group norm, or an RMS norm over channels with its factors in `gamma`.
    """

    def __init__(self, norm: Any, conv: Any) -> None:
        self._norm, self._conv = norm, conv
        self._shared: Any = getattr(conv, "shared", None)
        self._shared_moments: Any = getattr(norm, "shared", None)
        self._remembers = remembers(conv)
        self._convolve = conv.forward if self._shared is None else self._shared

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """What the convolution gives.

        Args:
            bias: of the convolution before, one number for each channel.
        """
        shared = self._shared
        if self._remembers:
            sides = shared.room_for(x.shape)[3:] if shared else tuple(x.shape[3:])
            room = room_behind_history(self._conv, x, sides)
            new = room[:, :, -x.shape[2] :]
        else:
            room = new = _empty_pictures(x, shared.room_for(x.shape) if shared else tuple(x.shape))
        self._normalise(x, bias, shared.own(new) if shared else new)
        if not self._remembers:
            return self._convolve(room)  # type: ignore[no-any-return]
        if not shared:
            return convolve_room(self._conv, room)
        shared.fill(new)
        with shared.unpadded():
            return convolve_room(self._conv, room)

    def _normalise(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        kernels = kernels_for(x)
        if isinstance(self._norm, nn.GroupNorm):
            kernels.group_norm_silu(x, bias, self._norm, out, self._shared_moments)
        else:
            kernels.rms_norm_silu(x, bias, self._norm.gamma.flatten(), out)


def _run_block(block: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
    (first, second), (bias, last_bias) = block.normed, block.biases
    out: torch.Tensor = kernels_for(x).add(shortcut, second(first(x, block.bias_before), bias), last_bias)
    return out


def _is_residual(module: Any) -> bool:
    """Whether a module adds conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))) to what comes in, and does nothing else."""
    if not all(hasattr(module, name) for name in ("norm1", "conv1", "norm2", "conv2", "nonlinearity", "conv_shortcut")):
        return False
    others = [getattr(module, name, None) for name in ("time_emb_proj", "upsample", "downsample")]
    plain = getattr(module, "output_scale_factor", 1) == 1 and others == [None, None, None]
    return plain and isinstance(module.nonlinearity, nn.SiLU) and isinstance(module.conv1.bias, nn.Parameter)


def _doubles(module: nn.Module) -> bool:
    """Whether a module gives each pixel four times."""
    if not isinstance(module, nn.Upsample) or not module.mode.startswith("nearest"):
        return False
    scale: Any = module.scale_factor
    return all(factor == 2 for factor in (scale if isinstance(scale, tuple) else (scale,)))


def _interpolates(upsample: Any) -> bool:
    return upsample.interpolate and not upsample.use_conv_transpose and not upsample.norm


def _convolves(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def _double(x: torch.Tensor) -> torch.Tensor:
    doubled = _empty_pictures(x, _doubled(x))
    kernels_for(x).double(x, doubled)
    return doubled


def _double_and_convolve(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """Pixels are written to where the convolution reads them, beside its neighbours' edges."""
    shared: Any = getattr(conv, "shared", None)
    if shared is None:
        return conv(_double(x))  # type: ignore[no-any-return]
    room = _empty_pictures(x, shared.room_for(_doubled(x)))
    kernels_for(x).double(x, shared.own(room))
    return shared(room)  # type: ignore[no-any-return]


def _doubled(x: torch.Tensor) -> tuple[int, ...]:
    return (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])


def _empty_pictures(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Pictures or clips, channels last."""
    layout = torch.channels_last_3d if like.ndim == 5 else torch.channels_last
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _upsample(upsample: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    if not upsample.use_conv:
        return _double(x)
    return _double_and_convolve(upsample.conv if upsample.name == "conv" else upsample.Conv2d_0, x)


def compile_decoder(vae: Any) -> None:
    """The whole decoder, a graph for each shape and kind of chunk; `seal` ends it."""
    torch.compiler.set_stance("default")
    vae.decoder.forward = torch.compile(vae.decoder.forward, dynamic=False)


def seal() -> None:
    """From now on shapes without a graph run eagerly: no request waits for a compiler."""
    torch.compiler.set_stance("eager_on_recompile")
