"""`copy_heads` as one Triton kernel, and `copy_rows` by copy engines.

A token's heads for one rank are one piece of memory on both sides: a program copies its token's pieces as they are.
Stores to a peer cross the link without waiting for an answer, so nothing is packed first, and one launch serves all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
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


# One side of CUDA_MEMCPY2D of the CUDA driver API.
_SIDE = (
    ("XInBytes", ctypes.c_size_t),
    ("Y", ctypes.c_size_t),
    ("MemoryType", ctypes.c_int),
    ("Host", ctypes.c_void_p),
    ("Device", ctypes.c_uint64),
    ("Array", ctypes.c_void_p),
    ("Pitch", ctypes.c_size_t),
)
# CU_MEMORYTYPE_UNIFIED: the driver sees from an address whose memory it is.
_UNIFIED = 4


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (
        *((f"src{name}", kind) for name, kind in _SIDE),
        *((f"dst{name}", kind) for name, kind in _SIDE),
        ("WidthInBytes", ctypes.c_size_t),
        ("Height", ctypes.c_size_t),
    )


def copy_pitched(source: torch.Tensor, target: torch.Tensor) -> None:
    """See `copy_rows`; on the current stream. PyTorch would copy what has gaps by a kernel.

    Raises:
        RuntimeError: the driver refuses.
    """
    copy = _Copy2D(WidthInBytes=source[0].numel() * source.element_size(), Height=source.shape[0])
    for side, tensor in (("src", source), ("dst", target)):
        setattr(copy, f"{side}MemoryType", _UNIFIED)
        setattr(copy, f"{side}Device", tensor.data_ptr())
        setattr(copy, f"{side}Pitch", tensor.stride(0) * tensor.element_size())
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    if error := _driver().cuMemcpy2DAsync_v2(ctypes.byref(copy), stream):
        raise RuntimeError(f"cuMemcpy2DAsync: CUDA error {error}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
