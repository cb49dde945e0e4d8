"""Clips through causal video VAEs chunk by chunk, and single pictures as pictures.

A causal convolution sees only frames that came before. Of each clip it therefore keeps the last frames of its input
(a `Stream` holds them), and a chunk of frames gives what it would give inside of the whole clip. Memory
does not grow with the clip, several clips or tiles can be on their way at once, and frames leave while later ones are
still latents.

Libraries are better at some 2-D convolutions than at the 3-D ones. A decoder's convolutions can take the frames that a
kernel meets as more channels of one picture, conv3d(x, W) = conv2d(frames side by side, slices side by side): the same
sums in another order (4e-6 apart in fp32). On CPUs all of them do: five times faster (tiny Wan, 128x192, nine frames,
one core). On GPUs those do whose channels are no multiple of 64, for which cuDNN has only a slow 3-D kernel (96
channels at 480p, H100: 3.2 ms against 1.5 ms and the copy; 192 channels: 1.3 ms both).
For a single picture there is no history: only the last temporal slice of a kernel meets data, and
conv3d(pad(x), W) = conv2d(x, W[:, :, -1]). It is the same sum with the zero terms left out (2e-6 apart in fp32), and
fourteen times faster with weights in channels_last order (256x256, two CPU cores). An encoder gives clips bit for bit
what the library gives, since denoising goes on from there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from services.vae_kernels import kernels_for

WHOLE_CHANNELS = 64
"""Multiples of it suit a GPU's kernels for 3-D convolutions."""


@dataclass(slots=True)
class Stream:
    """One clip, tile or picture on its way through a VAE.

    Attributes:
        one_frame: it is a picture.
        first: the chunk in work is the first one.
        history: the last frames of each convolution's input.
    """

    one_frame: bool
    first: bool = True
    history: dict[nn.Module, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Work:
    """Whose chunk a VAE works on now; shared by its convolutions."""

    stream: Stream = field(default_factory=lambda: Stream(one_frame=True))


class CausalCodec:
    """Codec of a diffusers video VAE (AutoencoderKLQwenImage, AutoencoderKLWan); it rebinds the VAE's layers.

    A causal convolution is a Conv3d whose diffusers class keeps its padding in `_padding`
    (left, right, top, bottom, front, back) and pads in front only; a module with a `time_conv` changes the frame rate.

    Args:
        frames_a_step: latent frames that are decoded at once, after the first one.
    """

    def __init__(self, vae: Any, frames_a_step: int = 1) -> None:
        self._vae = vae
        self._frames_a_step = frames_a_step
        self._work = Work()
        # Only some decoders have layers to which the first chunk is special.
        self._says_first = "first_chunk" in inspect.signature(vae.decoder.forward).parameters
        on_cpu = vae.post_quant_conv.weight.device.type == "cpu"
        decoding = {vae.post_quant_conv, *vae.decoder.modules()}
        for module in list(vae.modules()):
            if isinstance(module, nn.Conv3d) and hasattr(module, "_padding"):
                padding: Any = module._padding
                module.padding = (0, padding[2], padding[0])
                _rebind(module, self._work, module.weight[:, :, -1], _convolve_in_time)
                if module in decoding and (on_cpu or module.in_channels % WHOLE_CHANNELS):
                    # [out, in, F, h, w] to [out, F in, h, w].
                    slices = module.weight.detach().transpose(1, 2).flatten(1, 2)
                    slices = slices.contiguous(memory_format=torch.channels_last)
                    module.register_buffer("weight_side_by_side", slices, persistent=False)
            elif isinstance(module, nn.Conv2d):
                # One layout through the whole VAE: nothing is reordered between its convolutions.
                _rebind(module, self._work, module.weight, _convolve)
            elif hasattr(module, "time_conv") or hasattr(module, "resample"):
                _rebind(module, self._work, None, _resample)

    def decode(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Latents [B, C, F', h, w] to chunks of frames [B, 3, F, H, W], the first of one latent frame."""
        frames, step = latents.shape[2], self._frames_a_step
        stream = Stream(one_frame=frames == 1)
        with self._worked_on(stream):
            latents = self._vae.post_quant_conv(latents)
        for start, end in _chunks(frames, step):
            with self._worked_on(stream):
                first = {"first_chunk": stream.first} if self._says_first else {}
                chunk = self._vae.decoder(latents[:, :, start:end], **first)
                stream.first = False
            yield unpatchify(chunk, self._patch)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, F, H, W], F = 4 k + 1, to means and log variances [B, 2 C, F', h, w]."""
        frames, step = pixels.shape[2], 2 ** sum(self._vae.config.temperal_downsample)
        stream = Stream(one_frame=frames == 1)
        moments: list[torch.Tensor] = []
        with self._worked_on(stream):
            for start, end in _chunks(frames, step):
                moments.append(self._vae.encoder(patchify(pixels[:, :, start:end], self._patch)))
                stream.first = False
            whole: torch.Tensor = self._vae.quant_conv(torch.cat(moments, dim=2))
        return whole

    @contextmanager
    def _worked_on(self, stream: Stream) -> Iterator[None]:
        self._work.stream = stream
        try:
            yield
        finally:
            # A clip's history is gigabytes: it goes with the clip.
            self._work.stream = Stream(one_frame=True)

    @property
    def _patch(self) -> int:
        return getattr(self._vae.config, "patch_size", None) or 1


def patchify(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """[B, 3, F, H, W] to [B, 3 side², F, H / side, W / side], columns of a patch before its rows as the VAE has it."""
    if side == 1:
        return pixels
    x: torch.Tensor = pixels.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(patches: torch.Tensor, side: int) -> torch.Tensor:
    """What undoes `patchify`."""
    if side == 1:
        return patches
    x: torch.Tensor = patches.unflatten(1, (-1, side, side))
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(-2).flatten(-3, -2)


def _chunks(frames: int, step: int) -> Iterator[tuple[int, int]]:
    """The first frame alone, then `step` at a time."""
    yield 0, 1
    for start in range(1, frames, step):
        yield start, min(start + step, frames)


def _rebind(module: Any, work: Work, weight: torch.Tensor | None, forward: Any) -> None:
    if weight is not None:
        kernel = weight.detach().contiguous(memory_format=torch.channels_last)
        module.register_buffer("weight_2d", kernel, persistent=False)
    module.work = work
    module.forward = MethodType(forward, module)


def remembers(conv: Any) -> bool:
    """Whether a convolution meets earlier frames, and nobody but ranks has put anything around it."""
    if getattr(conv, "work", None) is None or not isinstance(conv, nn.Conv3d):
        return False
    untouched = getattr(conv.forward, "__func__", None) is _convolve_in_time
    return (untouched or hasattr(conv, "shared")) and _kept(conv) > 0


def room_behind_history(conv: Any, like: torch.Tensor, sides: tuple[int, ...]) -> torch.Tensor:
    """Memory [B, C, kept + F, *sides] for the input of a convolution that `remembers`, channels last.

    The frames that the convolution meets beside the new ones are there already, black ones before the first chunk; a
    picture has none.

    Args:
        like: [B, C, F, ...], the new frames.
    """
    stream: Stream = conv.work.stream
    kept = 0 if stream.one_frame else _kept(conv)
    shape = (*like.shape[:2], kept + like.shape[2], *sides)
    room = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)
    if kept:
        before = stream.history.get(conv)
        room[:, :, :kept] = 0 if before is None else before
    return room


def convolve_room(conv: Any, room: torch.Tensor) -> torch.Tensor:
    """What a convolution gives for `room_behind_history` with the new frames in it; it remembers the last of them."""
    stream: Stream = conv.work.stream
    if stream.one_frame:
        return _convolve_picture(conv, room)
    stream.history[conv] = room[:, :, -_kept(conv) :].clone()
    return _convolve_clip(conv, room)


def _kept(conv: Any) -> int:
    return int(conv.kernel_size[0] - conv.stride[0])


def _convolve_in_time(conv: Any, x: torch.Tensor) -> torch.Tensor:
    stream: Stream = conv.work.stream
    if stream.one_frame:
        return _convolve_picture(conv, x)
    return _convolve_clip(conv, _with_history(conv, stream, x))


def _convolve_picture(conv: Any, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x[:, :, 0], conv.weight_2d, conv.bias, conv.stride[1:], conv.padding[1:]).unsqueeze(2)


def _convolve_clip(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """A clip with its history before it."""
    if (weight := getattr(conv, "weight_side_by_side", None)) is None:
        return conv._conv_forward(x, conv.weight, conv.bias)  # type: ignore[no-any-return]
    pictures = kernels_for(x).side_by_side(x, conv.kernel_size[0])
    out = F.conv2d(pictures, weight, conv.bias, padding=conv.padding[1:])
    clip: torch.Tensor = out.unflatten(0, (len(x), -1)).transpose(1, 2)
    return clip


def _with_history(conv: Any, stream: Stream, x: torch.Tensor) -> torch.Tensor:
    """The frames that the convolution meets beside the new ones, before them; the last ones are kept for the next."""
    kept = _kept(conv)
    if not kept:
        return x
    before = stream.history.get(conv)
    x = F.pad(x, (0, 0, 0, 0, kept, 0)) if before is None else torch.cat([before, x], dim=2)
    stream.history[conv] = x[:, :, -kept:].clone()
    return x


def _convolve(conv: Any, x: torch.Tensor) -> torch.Tensor:
    one_frame = conv.work.stream.one_frame
    out: torch.Tensor = conv._conv_forward(x, conv.weight_2d if one_frame else conv.weight, conv.bias)
    return out


def _resample(module: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Twice or half the size, and, but for the first frame, twice or half the rate."""
    stream: Stream = module.work.stream
    if module.mode == "upsample3d" and not stream.first:
        x = _interleave(module.time_conv(x))
    batch = x.shape[0]
    x = module.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1)).transpose(1, 2)
    if module.mode == "downsample3d":
        if not stream.first:
            return module.time_conv(x)  # type: ignore[no-any-return]
        stream.history[module.time_conv] = x[:, :, -1:].clone()
    return x


def _interleave(x: torch.Tensor) -> torch.Tensor:
    """[B, 2 C, F, H, W] to [B, C, 2 F, H, W]: the halves of the channels take turns as frames; the layout stays."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d)
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels // 2, 2 * frames, height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    for turn, half in enumerate(x.chunk(2, dim=1)):
        out[:, :, turn::2] = half
    return out
