"""Where a kernel finds the edges of a picture's piece."""

from __future__ import annotations

import pytest
import torch

from services.parallel.edges import Edges, channels_last
from services.parallel.vae_pieces import room_around


def found(room: torch.Tensor, edges: Edges, first: int, run: int) -> torch.Tensor:
    """The numbers of all runs of an edge, one after the other."""
    frames, height, *strides = edges.lines
    words = room.as_strided((room.untyped_storage().nbytes() // room.itemsize,), (1,), 0).view(edges.word)
    start = room.storage_offset() * room.itemsize // edges.word.itemsize + first
    runs = words.as_strided((len(room), frames, height, run), (*strides, 1), start)
    return runs.contiguous().view(room.dtype).flatten()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize(("before", "behind"), [(1, 1), (0, 1), (2, 1)])
@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (1, 3, 4, 6), (2, 8, 3, 5, 4)])
def test_edges_lie_where_the_rows_are(shape, before, behind, dim, dtype) -> None:
    layout = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    room = room_around(torch.randn(shape).to(dtype, memory_format=layout), dim, before, behind)
    room.narrow(dim, 0, before).normal_()
    room.narrow(dim, room.shape[dim] - behind, behind).normal_()
    # Behind the frames that a convolution remembers, which are not exchanged.
    room = room[:, :, 1:] if room.ndim == 5 else room
    assert channels_last(room)
    edges = Edges.of(room, dim, before, behind)
    rows = shape[dim]
    for first, run, start, count in (
        (0, edges.before, 0, before),
        (edges.before, edges.behind, before, behind),
        (edges.last, edges.before, rows, before),
        (edges.behind_at, edges.behind, before + rows, behind),
    ):
        expected = room.narrow(dim, start, count).movedim(1, -1).flatten()
        assert torch.equal(found(room, edges, first, run), expected)
    numbers = edges.word.itemsize // room.itemsize
    assert edges.count_before * numbers == room.narrow(dim, 0, before).numel()
    assert edges.count_behind * numbers == room.narrow(dim, 0, behind).numel()


def test_rows_that_lie_apart_are_not_taken_for_channels_last() -> None:
    assert not channels_last(torch.empty(1, 4, 5, 6))
    assert not channels_last(torch.empty(1, 4, 5, 6).to(memory_format=torch.channels_last)[..., 1:])
