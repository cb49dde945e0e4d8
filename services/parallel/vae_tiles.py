"""A VAE's pictures in overlapping tiles, on one rank or spread over several.

Tiles bound the memory of large pictures; of clips hardly, as each tile keeps its history. Norms and attention of a tile
see that tile only, so the picture is nearly, not exactly, that of the whole; the ranks change nothing about it, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F

from services.errors import StartupError
from services.family import Codec
from services.parallel.collectives import all_gather
from services.parallel.mesh import Axis

# A quarter of a tile lies over the next one.
OVERLAP = 4

Places = list[tuple[slice, slice]]


class TileCodec:
    """The codec of tiles, which are blended where they overlap.

    The tiles of a clip go on side by side, chunk by chunk. Ranks take tiles in turns, those that have none left repeat
    the last one, and every rank gets the whole picture.

    Args:
        codec: of whole pictures.
        side_px: of a tile.
        compression: pixels for one latent along a side.
        axis: the ranks; None for one.
    """

    def __init__(self, codec: Codec, side_px: int, compression: int, axis: Axis | None = None) -> None:
        self._codec = codec
        self._side = side_px // compression
        self._compression = compression
        self._axis = axis

    def decode(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """See `Codec`."""
        height, width = latents.shape[-2:]
        if max(height, width) <= self._side:
            yield from self._codec.decode(latents)
            return
        places = tiles(height, width, self._side)
        own = self._own(len(places))
        streams = [self._codec.decode(latents[(..., *places[index])]) for index in own]
        for parts in zip(*streams, strict=True):
            yield self._blended(parts, (height, width), self._compression)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `Codec`."""
        height, width = (side // self._compression for side in pixels.shape[-2:])
        if max(height, width) <= self._side:
            return self._codec.encode(pixels)
        places = tiles(height, width, self._side)
        scale = self._compression
        moments = []
        for index in self._own(len(places)):
            down, across = (slice(scale * place.start, scale * place.stop) for place in places[index])
            moments.append(self._codec.encode(pixels[..., down, across]))
        return self._blended(moments, (height, width), 1)

    def _own(self, count: int) -> list[int]:
        """Which tiles are this rank's: equally many on each."""
        rank, size = (self._axis.rank, self._axis.size) if self._axis else (0, 1)
        return [min(index + rank, count - 1) for index in range(0, count, size)]

    def _blended(self, parts: Sequence[torch.Tensor], sides: tuple[int, int], scale: int) -> torch.Tensor:
        """The picture, from this rank's tiles; `scale` entries for one latent along a side."""
        places = tiles(*sides, self._side)
        rows: dict[int, list[torch.Tensor]] = {}
        for (down, across), tile in zip(places, self._all(parts, scale), strict=False):
            sized = tile[..., : scale * (down.stop - down.start), : scale * (across.stop - across.start)]
            rows.setdefault(down.start, []).append(sized.clone())
        stride = scale * _stride(self._side)
        blended = blend(list(rows.values()), scale * self._side - stride)
        return torch.cat([torch.cat([t[..., :stride, :stride] for t in row], dim=-1) for row in blended], dim=-2)

    def _all(self, parts: Sequence[torch.Tensor], scale: int) -> list[torch.Tensor]:
        """Every rank's tiles in their order, those at the edges filled up."""
        if self._axis is None:
            return list(parts)
        side = scale * self._side
        filled = [F.pad(part, (0, side - part.shape[-1], 0, side - part.shape[-2])) for part in parts]
        gathered = all_gather(torch.stack(filled), self._axis.name, self._axis.size)
        return [gathered[rank, turn] for turn, rank in product(range(len(parts)), range(self._axis.size))]


def check_tile(side_px: int, compression: int) -> None:
    """A tile and what it overlaps are whole latents.

    Raises:
        StartupError: this one's are not, with sides that would do.
    """
    step = OVERLAP * compression
    if side_px < step or side_px % step:
        near = max(step, side_px // step * step)
        raise StartupError(
            f"engine.tile_px {side_px} is no multiple of {step} ({OVERLAP} latents): use {near} or {near + step}"
        )


def tiles(height: int, width: int, side: int) -> Places:
    """Where the tiles of a picture lie, row by row, in latents; those at its end are cut off there."""
    stride = _stride(side)
    return [
        (slice(top, min(top + side, height)), slice(left, min(left + side, width)))
        for top, left in product(range(0, height, stride), range(0, width, stride))
    ]


def blend(rows: list[list[torch.Tensor]], overlap: int) -> list[list[torch.Tensor]]:
    """Tiles by rows, each faded into from the one above and from the one on its left, in place."""
    for index, row in enumerate(rows):
        for place, tile in enumerate(row):
            if index:
                _fade(rows[index - 1][place], tile, overlap, -2)
            if place:
                _fade(row[place - 1], tile, overlap, -1)
    return rows


def _fade(earlier: torch.Tensor, tile: torch.Tensor, overlap: int, dim: int) -> None:
    extent = min(earlier.shape[dim], tile.shape[dim], overlap)
    share = torch.arange(extent, device=tile.device, dtype=torch.float64) / extent
    share = share.view(-1, *(1,) * (-dim - 1))
    before, after = (1 - share).to(tile.dtype), share.to(tile.dtype)
    start = tile.narrow(dim, 0, extent)
    start.copy_(earlier.narrow(dim, earlier.shape[dim] - extent, extent) * before + start * after)


def _stride(side: int) -> int:
    return side * (OVERLAP - 1) // OVERLAP
