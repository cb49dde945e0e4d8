"""A VAE's pictures over ranks, exactly: each rank has some rows (or columns), and layers look over the border.

The longer side of the latents is cut into nearly equal pieces, at every resolution at the same places. What a layer
needs of the others it tells by itself:

    convolution     as many rows of its neighbours as its kernel reaches over the border, by its own numbers
    group norm      the moments of all pieces
    attention       (the classes that the `VaePlan` names) the whole picture, at the latents' size; where it asks for
                    them, others' keys and values only
    all others      nothing: they work pixel by pixel, or resample by whole factors

A layer keeps its forward, whatever that does: a convolution gets a piece with its neighbours' edges instead of padding.
So this goes with causal convolutions that remember frames, and with kernels that were replaced. Who writes a
convolution's input himself can leave room for the edges in it, and saves a copy (`SharedConvolution`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from services.family import Codec, VaeModel, VaePlan
from services.parallel.collectives import all_gather, fill_halo
from services.parallel.degrees import split_sizes
from services.parallel.mesh import Axis


@dataclass(slots=True)
class Cut:
    """How the picture in work is cut; shared by all layers.

    Attributes:
        dim: -2 or -1; 0 while a picture is whole on every rank.
        sizes: of the ranks' pieces, in latents.
    """

    dim: int = 0
    sizes: tuple[int, ...] = ()


class PatchCodec:
    """The codec of a picture's pieces; what it gives is whole on every rank.

    A picture whose longer side gives some rank fewer latents than a kernel reaches over a border is worked on whole, by
    every rank; with kernels of three, that is one of fewer latents than ranks.

    Args:
        model: whose layers are rebound.
        compression: pixels for one latent along a side.
    """

    def __init__(self, model: VaeModel, plan: VaePlan, compression: int, axis: Axis) -> None:
        self._codec: Codec = model.codec
        self._compression = compression
        self._axis = axis
        self._cut = Cut()
        reaches = [_reach(conv, side) for conv in convolutions(model.module) for side in (-2, -1)]
        self._least = max(1, *(max(reach) for reach in reaches))
        _rebind_layers(model.module, plan, self._cut, axis)

    def decode(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """See `Codec`."""
        cut = self._cut_of(latents.shape[-2:])
        chunks = self._codec.decode(own_piece(latents, cut, self._axis.rank))
        while True:
            # Others may have used the layers since the last chunk.
            self._cut.dim, self._cut.sizes = cut.dim, cut.sizes
            if (chunk := next(chunks, None)) is None:
                return
            yield whole(chunk, cut, self._axis)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `Codec`."""
        cut = self._cut_of([side // self._compression for side in pixels.shape[-2:]])
        self._cut.dim, self._cut.sizes = cut.dim, cut.sizes
        return whole(self._codec.encode(own_piece(pixels, cut, self._axis.rank)), cut, self._axis)

    def _cut_of(self, latent_sides: torch.Size | list[int]) -> Cut:
        height, width = latent_sides
        side, dim = (height, -2) if height >= width else (width, -1)
        fits = side >= self._axis.size * self._least
        return Cut(dim, tuple(split_sizes(side, self._axis.size))) if fits else Cut()


def own_piece(x: torch.Tensor, cut: Cut, rank: int) -> torch.Tensor:
    """A rank's piece of what all ranks have whole, at any resolution."""
    if not cut.dim:
        return x
    scale = x.shape[cut.dim] // sum(cut.sizes)
    return x.narrow(cut.dim, scale * sum(cut.sizes[:rank]), scale * cut.sizes[rank])


def whole(piece: torch.Tensor, cut: Cut, axis: Axis) -> torch.Tensor:
    """What all ranks' pieces make together."""
    if not cut.dim:
        return piece
    scale = piece.shape[cut.dim] // cut.sizes[axis.rank]
    missing = scale * max(cut.sizes) - piece.shape[cut.dim]
    padding = (0, missing) if cut.dim == -1 else (0, 0, 0, missing)
    gathered = all_gather(F.pad(piece, padding), axis.name, axis.size)
    parts = [part.narrow(cut.dim, 0, scale * size) for part, size in zip(gathered, cut.sizes, strict=True)]
    return torch.cat(parts, dim=cut.dim)


def convolutions(module: nn.Module) -> list[Any]:
    """All of a module's."""
    return [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Conv3d)]


def _rebind_layers(module: nn.Module, plan: VaePlan, cut: Cut, axis: Axis) -> None:
    """Of a module and those in it; attention sees whole pictures, and so does all that it is made of."""
    for part in module.children():
        if isinstance(part, plan.attention) and hasattr(part, "keys_of_all"):
            attention: Any = part
            attention.keys_of_all = SharedKeys(cut, axis)
            _rebind_layers(part, plan, cut, axis)
        elif isinstance(part, plan.attention):
            _wrap(part, _attend, cut, axis)
        elif isinstance(part, nn.Conv2d | nn.Conv3d):
            shared: Any = part
            shared.shared = SharedConvolution(part, cut, axis)
            _wrap(part, _convolve, cut, axis)
        elif isinstance(part, nn.GroupNorm):
            _wrap(part, _normalise, cut, axis)
        else:
            _rebind_layers(part, plan, cut, axis)


class SharedConvolution:
    """What a convolution sees of the neighbours' pieces.

    Args:
        conv: with a forward that takes its input without them.
    """

    def __init__(self, conv: Any, cut: Cut, axis: Axis) -> None:
        self._conv, self._cut, self._axis = conv, cut, axis
        self._forward = conv.forward

    def __call__(self, room: torch.Tensor) -> torch.Tensor:
        """What the convolution gives for a room with the piece in it."""
        self.fill(room)
        with self.unpadded():
            return self._forward(room)  # type: ignore[no-any-return]

    def room_for(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a piece with its neighbours' edges."""
        sides = list(shape)
        if self._cut.dim:
            sides[self._cut.dim] += sum(_reach(self._conv, self._cut.dim))
        return tuple(sides)

    def own(self, room: torch.Tensor) -> torch.Tensor:
        """Where the piece itself lies in a room."""
        if not self._cut.dim:
            return room
        before, behind = _reach(self._conv, self._cut.dim)
        return room.narrow(self._cut.dim, before, room.shape[self._cut.dim] - before - behind)

    def fill(self, room: torch.Tensor) -> None:
        """The neighbours' edges into a room with the piece in it."""
        if self._cut.dim:
            before, behind = _reach(self._conv, self._cut.dim)
            fill_halo(room, self._cut.dim, before, behind, self._axis.name, self._axis.rank, self._axis.size)

    @contextmanager
    def unpadded(self) -> Iterator[None]:
        """Inside, the convolution adds no padding where pieces meet."""
        padding = self._conv.padding
        if self._cut.dim:
            self._conv.padding = tuple(
                0 if side - len(padding) == self._cut.dim else number for side, number in enumerate(padding)
            )
        try:
            yield
        finally:
            self._conv.padding = padding


class SharedKeys:
    """What an attention sees of the other pieces, where it is made to ask for it (`vae_attention`)."""

    def __init__(self, cut: Cut, axis: Axis) -> None:
        self._cut, self._axis = cut, axis

    def __call__(self, own: torch.Tensor) -> torch.Tensor:
        """Keys, or values, of all pieces' pixels for those of one's own: [B, N, C], one piece after the other."""
        sizes, rank = self._cut.sizes, self._axis.rank
        if not self._cut.dim:
            return own
        pixels = own.shape[1] // sizes[rank]
        padded = F.pad(own, (0, 0, 0, pixels * (max(sizes) - sizes[rank])))
        gathered = all_gather(padded, self._axis.name, self._axis.size)
        return torch.cat([part[:, : pixels * size] for part, size in zip(gathered, sizes, strict=True)], dim=1)


def _wrap(layer: Any, around: Any, cut: Cut, axis: Axis) -> None:
    forward = layer.forward

    def forward_piece(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not cut.dim:
            return forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        return around(layer, lambda piece: forward(piece, *args, **kwargs), x, cut, axis)  # type: ignore[no-any-return]

    layer.forward = forward_piece


def _convolve(conv: Any, forward: Any, x: torch.Tensor, cut: Cut, _axis: Axis) -> torch.Tensor:
    """With the neighbours' rows.

    A convolution with a stride gets its padding from outside, all of it behind the last row: the neighbour's rows take
    its place, and behind the whole zeros do.
    """
    before, behind = _reach(conv, cut.dim)
    if not (before or behind):
        return forward(x)  # type: ignore[no-any-return]
    own = x.narrow(cut.dim, 0, x.shape[cut.dim] - (0 if before else behind))
    room = _room_around(own, cut.dim, before, behind)
    return conv.shared(room)  # type: ignore[no-any-return]


def with_halo(tensor: torch.Tensor, dim: int, before: int, behind: int, axis: Axis) -> torch.Tensor:
    """A piece of a whole with the edges of its neighbours, zeros beyond the whole.

    Args:
        tensor: [B, C, ..., H, W], a piece in dimension `dim`, -2 or -1.
        before, behind: rows of the piece before it, and of the one behind it.
    """
    room = _room_around(tensor, dim, before, behind)
    fill_halo(room, dim, before, behind, axis.name, axis.rank, axis.size)
    return room


def _room_around(tensor: torch.Tensor, dim: int, before: int, behind: int) -> torch.Tensor:
    """A piece with room for its neighbours' edges."""
    rows = tensor.shape[dim]
    shape = list(tensor.shape)
    shape[dim] = before + rows + behind
    room = torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=_layout(tensor))
    room.narrow(dim, before, rows).copy_(tensor)
    return room


def _layout(tensor: torch.Tensor) -> torch.memory_format:
    """Of a picture or clip, or of a piece of one, which is not dense; on GPUs all have one layout, on every rank."""
    if tensor.stride(1) != 1 and not tensor.is_cuda:
        return torch.contiguous_format
    return torch.channels_last_3d if tensor.ndim == 5 else torch.channels_last


def _reach(conv: Any, dim: int) -> tuple[int, int]:
    """Rows before and behind those that a convolution goes through, stride by stride."""
    kernel, stride, before = (numbers[dim] for numbers in (conv.kernel_size, conv.stride, conv.padding))
    return before, kernel - stride - before


def _normalise(norm: Any, _forward: Any, x: torch.Tensor, _cut: Cut, axis: Axis) -> torch.Tensor:
    """By the mean and variance of all pieces, from each piece's own (Chan et al.), which loses no digits."""
    groups = x.unflatten(1, (norm.num_groups, -1))
    mean, variance = _moments(groups)
    count = torch.full_like(mean, groups[0, 0].numel())
    counts, means, variances = all_gather(torch.stack([count, mean, variance]), axis.name, axis.size).unbind(1)
    share = counts / counts.sum(0)
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean) ** 2)).sum(0)
    repeats = groups.shape[2]
    weight, bias = (norm.weight.float(), norm.bias.float()) if norm.affine else (None, None)
    rows = [
        # Known moments of each channel: a batch norm. It takes them in float32 beside a picture in less.
        F.batch_norm(row[None], row_mean, row_variance, weight, bias, eps=norm.eps)
        for row, row_mean, row_variance in zip(
            x, mean.repeat_interleave(repeats, 1), variance.repeat_interleave(repeats, 1), strict=True
        )
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _moments(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance [B, G] of [B, G, ...] in float32; what comes in less is not copied into it."""
    inside = tuple(range(2, groups.ndim))
    if groups.dtype == torch.float32:
        variance, mean = torch.var_mean(groups, inside, correction=0)
        return mean, variance
    count = groups[0, 0].numel()
    mean = groups.sum(inside, dtype=torch.float32) / count
    square = torch.linalg.vector_norm(groups, dim=inside, dtype=torch.float32) ** 2 / count
    return mean, (square - mean**2).clamp(min=0)


def _attend(_attention: Any, forward: Any, x: torch.Tensor, cut: Cut, axis: Axis) -> torch.Tensor:
    return own_piece(forward(whole(x, cut, axis)), cut, axis.rank)
