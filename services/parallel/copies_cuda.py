"""`copy_heads` as one Triton kernel.

A token's heads for one rank are one piece of memory on both sides: a program copies its token's pieces as they are.
Stores to a peer cross the link without waiting for an answer, so nothing is packed first, and one launch serves all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _copy(  # type: ignore[no-untyped-def]  # noqa: ANN202
    sources,  # noqa: ANN001
    targets,  # noqa: ANN001
    firsts,  # noqa: ANN001
    counts,  # noqa: ANN001
    stride,  # noqa: ANN001
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    for kind in tl.static_range(3):
        for rank in tl.static_range(len(targets)):
            inside = offsets < counts[rank]
            words = tl.load(sources[kind] + token * stride + firsts[rank] + offsets, mask=inside)
            tl.store(targets[rank] + (token * 3 + kind) * counts[rank] + offsets, words, mask=inside)


def launch(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], heads: Sequence[slice]) -> None:
    """See `copy_heads`; targets are contiguous."""
    tokens, _, width = sources[0].shape
    if not tokens:
        return
    if len({source.stride() for source in sources}) > 1 or sources[0].stride()[1:] != (width, 1):
        sources = [source.contiguous() for source in sources]
    counts = tuple((own.stop - own.start) * width for own in heads)
    kernel: Any = _copy[(tokens,)]
    kernel(
        tuple(sources),
        tuple(targets),
        tuple(own.start * width for own in heads),
        counts,
        sources[0].stride(0),
        BLOCK=triton.next_power_of_2(max(counts)),
    )
