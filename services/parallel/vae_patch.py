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

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from services.family import Codec, VaeModel, VaePlan
from services.parallel.degrees import split_sizes
from services.parallel.mesh import Axis
from services.parallel.vae_pieces import (
    Cut,
    SharedConvolution,
    SharedKeys,
    SharedMoments,
    own_piece,
    reach,
    room_around,
    whole,
)
from services.vae_kernels import together


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
        reaches = [reach(conv, side) for conv in convolutions(model.module) for side in (-2, -1)]
        self._least = max(1, *(max(rows) for rows in reaches))
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
            norm: Any = part
            norm.shared = SharedMoments(cut, axis)
            _wrap(part, _normalise, cut, axis)
        else:
            _rebind_layers(part, plan, cut, axis)


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
    before, behind = conv.shared.reach
    if not (before or behind):
        return forward(x)  # type: ignore[no-any-return]
    own = x.narrow(cut.dim, 0, x.shape[cut.dim] - (0 if before else behind))
    room = room_around(own, cut.dim, before, behind)
    return conv.shared(room)  # type: ignore[no-any-return]


def _normalise(norm: Any, _forward: Any, x: torch.Tensor, _cut: Cut, _axis: Axis) -> torch.Tensor:
    """By the mean and variance of all pieces."""
    groups = x.unflatten(1, (norm.num_groups, -1))
    everybodys, shares = norm.shared(torch.stack(_moments(groups)))
    mean, variance = together(everybodys, shares)
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
