"""Tokens over the ranks of tensor parallelism: any number of them, in any order of fields, gathered and scattered."""

from __future__ import annotations

import pytest
import torch

from services.config import ParallelSection
from services.errors import StartupError
from services.parallel.degrees import Degrees

# Text and picture: more ranks than tokens, one token too many, and none.
LENGTHS = [(1, 2), (4, 7), (6, 9), (5, 1)]


@pytest.mark.parametrize("fields", [("hidden",), ("text", "hidden"), ("hidden", "text")])
@pytest.mark.parametrize("rows", [1, 2])
def test_gathered_tokens_are_whole_and_in_order_and_scattered_ones_are_summed(pool, fields, rows):
    by_rank = pool.run("gather_and_scatter", 3, fields, LENGTHS, rows)
    for results in by_rank:
        for gathered, whole, scattered, piece in results:
            assert torch.equal(gathered, whole)
            # Each rank's part was the whole: what comes back is three times this rank's own tokens.
            assert torch.equal(scattered, 3 * piece)


def test_norms_are_not_spread_over_one_rank():
    with pytest.raises(StartupError, match="tensor_parallel_size, which is 1: raise it, or turn this off"):
        Degrees.of(ParallelSection(tensor_sequence_parallel=True))
