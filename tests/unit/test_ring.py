"""Attention over the pieces of a ring: whatever lengths texts have, filling is left out and no kernel gets a mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from services.parallel import ring
from services.parallel.sequence import joined_order, ring_keys

HEADS, WIDTH = 3, 8


@pytest.fixture
def keys_of_kernels(monkeypatch) -> list[tuple[int, int]]:
    """Rows and keys of each call of a kernel."""
    calls: list[tuple[int, int]] = []
    kernel = ring._kernel_with_lse

    def noted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, name: str) -> ring.Partial:
        calls.append((key.shape[0], key.shape[2]))
        return kernel(query, key, value, name)

    monkeypatch.setattr(ring, "_kernel_with_lse", noted)
    return calls


def over_ring(query: torch.Tensor, keys_values: torch.Tensor, filling: list[int], lengths, size: int) -> torch.Tensor:
    """Of a whole sequence [B, S, H, D], cut over `size` ranks; what is filling there would spoil everything."""
    order = joined_order(lengths, size)
    pieces = keys_values[:, :, order.clamp(min=0)].index_fill(2, (order < 0).nonzero()[:, 0], torch.nan)
    orders, runs = ring_keys(order, torch.tensor(filling), size)
    parts = [
        ring._over_piece(query, (piece[0], piece[1]), orders[owner], runs[owner].tolist(), "sdpa")
        for owner, piece in enumerate(pieces.chunk(size, dim=2))
    ]
    results, lses = zip(*parts, strict=True)
    return ring.merged(results, torch.stack(lses).softmax(0))


@pytest.mark.parametrize(
    ("lengths", "size", "filling", "calls"),
    [
        # Text and picture of two rows: one kernel a piece, over what is real in it.
        ((6, 8), 2, [0, 0], [(2, 7), (2, 7)]),
        ((5, 8), 2, [0, 0], [(2, 7), (2, 6)]),
        ((5, 7), 4, [0, 0], [(2, 4), (2, 4), (2, 3), (2, 1)]),
        # A rank without a token of the text, and one without any.
        ((2, 9), 4, [0, 0], [(2, 4), (2, 4), (2, 3)]),
        # A shorter text: the pieces in which rows differ are attended to row by row.
        ((6, 8), 2, [0, 2], [(1, 7), (1, 5), (2, 7)]),
        ((6, 8), 2, [4, 4], [(2, 4), (2, 6)]),
        ((8,), 2, [0, 5], [(1, 4), (1, 4), (1, 3)]),
    ],
)
def test_filling_is_left_out_and_never_masked(keys_of_kernels, lengths, size, filling, calls):
    total = sum(lengths)
    query, key, value = torch.randn(3, len(filling), total, HEADS, WIDTH)
    mixed = over_ring(query, torch.stack((key, value)), filling, lengths, size)
    real = torch.arange(total) >= torch.tensor(filling)[:, None]
    whole = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), real[:, None, None])
    torch.testing.assert_close(mixed, whole.transpose(1, 2))
    assert keys_of_kernels == calls


def test_real_tokens_in_a_row_are_known_as_such():
    """By the first and the count: most are, as texts are filled up in front; not where a stream ends within a piece."""
    runs = [ring_keys(joined_order(lengths, 2), torch.tensor([0, 2]), 2)[1].tolist() for lengths in ((6, 8), (5, 8))]
    assert runs == [[[[0, 7], [2, 5]], [[0, 7], [0, 7]]], [[[0, 7], [2, 5]], [[-1, 6], [-1, 6]]]]
    key = torch.arange(7.0)[None, :, None, None]
    for first, count, expected in ((2, 5, [2, 3, 4, 5, 6]), (-1, 3, [0, 1, 3]), (-1, 0, [])):
        real, _ = ring._real((key, key), torch.tensor([0, 1, 3, 4, 5, 6, 2]), first, count)
        assert real.flatten().tolist() == expected
