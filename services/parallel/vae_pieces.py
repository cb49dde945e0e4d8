"""Pieces of a VAE's pictures: how they are cut, and what layers see of the others' pieces (`vae_patch`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from services.parallel.collectives import all_gather, fill_halo
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


def own_piece(x: torch.Tensor, cut: Cut, rank: int) -> torch.Tensor:
    """A rank's piece of what all ranks have whole, at any resolution."""
    if not cut.dim:
        return x
    scale = x.shape[cut.dim] // sum(cut.sizes)
    return x.narrow(cut.dim, scale * sum(cut.sizes[:rank]), scale * cut.sizes[rank])


def whole(piece: torch.Tensor, cut: Cut, axis: Axis) -> torch.Tensor:
    """What all ranks' pieces make together."""
    return joined(piece, cut.dim, cut, axis) if cut.dim else piece


def joined(piece: torch.Tensor, dim: int, cut: Cut, axis: Axis) -> torch.Tensor:
    """All ranks' pieces one after the other in dimension `dim`, -1 or -2, which has as much of each as it is large."""
    scale = piece.shape[dim] // cut.sizes[axis.rank]
    missing = scale * max(cut.sizes) - piece.shape[dim]
    padding = (0, missing) if dim == -1 else (0, 0, 0, missing)
    gathered = all_gather(F.pad(piece, padding), axis.name, axis.size)
    parts = [part.narrow(dim, 0, scale * size) for part, size in zip(gathered, cut.sizes, strict=True)]
    return torch.cat(parts, dim=dim)


class SharedConvolution:
    """What a convolution sees of the neighbours' pieces.

    Args:
        conv: with a forward that takes its input without them.
    """

    def __init__(self, conv: Any, cut: Cut, axis: Axis) -> None:
        self._conv, self._cut, self._axis = conv, cut, axis
        self._forward = conv.forward
        self._reaches = {dim: reach(conv, dim) for dim in (-2, -1)}

    def __call__(self, room: torch.Tensor) -> torch.Tensor:
        """What the convolution gives for a room with the piece in it."""
        self.fill(room)
        with self.unpadded():
            return self._forward(room)  # type: ignore[no-any-return]

    @property
    def reach(self) -> tuple[int, int]:
        """Rows of the piece before, and of the one behind; none while pictures are whole."""
        return self._reaches[self._cut.dim] if self._cut.dim else (0, 0)

    def room_for(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a piece with its neighbours' edges."""
        sides = list(shape)
        sides[self._cut.dim] += sum(self.reach)
        return tuple(sides)

    def own(self, room: torch.Tensor) -> torch.Tensor:
        """Where the piece itself lies in a room."""
        if not self._cut.dim:
            return room
        before, behind = self.reach
        return room.narrow(self._cut.dim, before, room.shape[self._cut.dim] - before - behind)

    def fill(self, room: torch.Tensor) -> None:
        """The neighbours' edges into a room with the piece in it."""
        if self._cut.dim:
            before, behind = self.reach
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


class SharedMoments:
    """What a group norm knows of the other pieces."""

    def __init__(self, cut: Cut, axis: Axis) -> None:
        self._cut, self._axis = cut, axis

    def __call__(self, own: torch.Tensor) -> tuple[torch.Tensor, tuple[float, ...]]:
        """Moments of all pieces [n, ...] for one's own [...], and each piece's share of the pixels."""
        if not self._cut.dim:
            return own[None], (1.0,)
        pixels = sum(self._cut.sizes)
        return all_gather(own, self._axis.name, self._axis.size), tuple(size / pixels for size in self._cut.sizes)


class SharedKeys:
    """What an attention sees of the other pieces, where it is made to ask for it (`vae_attention`)."""

    def __init__(self, cut: Cut, axis: Axis) -> None:
        self._cut, self._axis = cut, axis

    def __call__(self, own: torch.Tensor) -> torch.Tensor:
        """Keys, or values, of all pieces' pixels for those of one's own: [B, N, C], one piece after the other."""
        return joined(own, -2, self._cut, self._axis) if self._cut.dim else own


def room_around(tensor: torch.Tensor, dim: int, before: int, behind: int) -> torch.Tensor:
    """A piece of a whole with room for the edges of its neighbours.

    Args:
        tensor: [B, C, ..., H, W], a piece in dimension `dim`, -2 or -1.
        before, behind: rows of the piece before it, and of the one behind it.
    """
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


def reach(conv: Any, dim: int) -> tuple[int, int]:
    """Rows before and behind those that a convolution goes through, stride by stride."""
    kernel, stride, before = (numbers[dim] for numbers in (conv.kernel_size, conv.stride, conv.padding))
    return before, kernel - stride - before
