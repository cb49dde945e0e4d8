"""Heads of a rank's tokens to the ranks that attend with them: by one kernel on GPUs, or by copy engines beside others.

On the CPU by plain copies. Shapes: L tokens of one row, H heads, h of them for one rank, W words in a head's width.
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


def copy_rows(source: torch.Tensor, target: torch.Tensor) -> None:
    """Some heads of each token [L, h, W] to where they belong, which may be a peer's memory.

    A token's heads are one piece of memory on both sides, and the tokens are equally far apart, so that copy engines
    take them on a GPU.
    """
    if not source.numel():
        return
    if source.device.type != "cuda" or not (_in_rows(source) and _in_rows(target)):
        target.copy_(source)
        return
    from services.parallel.copies_cuda import copy_pitched

    copy_pitched(source, target)


def _in_rows(tensor: torch.Tensor) -> bool:
    """Whether all but the first dimension is one piece of memory."""
    return tensor[0].is_contiguous()
