"""Heads of a rank's tokens laid out for the ranks that attend with them: one kernel on GPUs, plain copies elsewhere.

Shapes: L tokens of one row, H heads, h of them for one rank, W words in a head's width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# The kernel moves numbers in words as wide as they allow, up to eight bytes.
WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)


def word_of(size: int) -> torch.dtype:
    """The widest type of which `size` bytes are a multiple."""
    return next(word for word in WORDS if size % word.itemsize == 0)


def copy_heads(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], heads: Sequence[slice]) -> None:
    """Queries, keys and values of all heads to where some of them belong, which may be a peer's memory.

    Args:
        sources: three of [L, H, W].
        targets: for each rank [L, 3, h, W].
        heads: each rank's.
    """
    if sources[0].device.type != "cuda":
        for target, own in zip(targets, heads, strict=True):
            torch.stack([source[:, own] for source in sources], dim=1, out=target)
        return
    # Imported where it is used: builds of torch without CUDA come without Triton.
    from services.parallel.copies_cuda import launch

    launch(sources, targets, heads)
