"""Tensors to wire frames and back, in rank processes: the torch side of `services/tensor_wire.py`.

A tensor travels as its raw little-endian bytes in C order. Every tensor has a crc32c in the header, which is checked
here, at the far end, so it also covers relays and our own mistakes with offsets and dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import numpy as np
import torch

from protos import types_pb2
from services.errors import CorruptTensor
from services.tensor_wire import (
    MAX_BUNDLE_BYTES,
    BundleCursor,
    Chunk,
    chunk_message,
    chunk_offsets,
    end_message,
    header_message,
    is_whole,
    whole_message,
    whole_of,
)

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

DTYPES: dict[torch.dtype, types_pb2.DType] = {
    torch.float32: types_pb2.DTYPE_FLOAT32,
    torch.float16: types_pb2.DTYPE_FLOAT16,
    torch.bfloat16: types_pb2.DTYPE_BFLOAT16,
    torch.float8_e4m3fn: types_pb2.DTYPE_FLOAT8_E4M3,
    torch.int64: types_pb2.DTYPE_INT64,
    torch.int32: types_pb2.DTYPE_INT32,
    torch.uint8: types_pb2.DTYPE_UINT8,
    torch.bool: types_pb2.DTYPE_BOOL,
}
_TORCH_DTYPES = {wire: dtype for dtype, wire in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Bundle:
    """Named tensors (on the CPU, contiguous) that travelled together, with their attributes."""

    tensors: dict[str, torch.Tensor]
    attributes: dict[str, str] = field(default_factory=dict)


def bundle_frames(
    tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, str] | None = None, *, whole_bytes: int = 0
) -> Iterator[bytes]:
    """A bundle as whole serialised streaming messages: header, chunks of 1 MiB at most, end.

    The messages own their bytes: a tensor may change as soon as its last chunk has been taken.

    Args:
        whole_bytes: a bundle of no more bytes is a single message.

    Raises:
        ValueError: a tensor's dtype has no form on the wire.
    """
    on_host = {name: _on_host(tensor) for name, tensor in tensors.items()}
    views = [_byte_view(tensor) for tensor in on_host.values()]
    header = types_pb2.TensorHeader(attributes=dict(attributes or {}))
    for (name, tensor), view in zip(on_host.items(), views, strict=True):
        header.tensors.add(
            name=name,
            dtype=_wire_dtype(name, tensor.dtype),
            shape=list(tensor.shape),
            nbytes=view.nbytes,
            crc32c=google_crc32c.value(view),
        )
    if sum(view.nbytes for view in views) <= whole_bytes:
        yield whole_message(header, [view.tobytes() for view in views])
        return
    yield header_message(header)
    for index, view in enumerate(views):
        for start, end in chunk_offsets(view.nbytes):
            yield chunk_message(index, start, view[start:end].data)
    yield end_message()


class BundleReader:
    """Collects one bundle after the other from TensorFrame messages.

    Args:
        max_bytes: how many bytes the tensors of one bundle may have together.
    """

    def __init__(self, max_bytes: int = MAX_BUNDLE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._cursor = BundleCursor(max_bytes)
        self._tensors: list[torch.Tensor] = []
        self._views: list[Bytes] = []

    def feed(self, frame_bytes: bytes | memoryview) -> Bundle | None:
        """Takes the next frame (the TensorFrame message itself); returns the bundle when it is complete.

        Raises:
            CorruptTensor: out of order, cut short, malformed, too large, or a checksum does not match. The reader
                is of no use after that.
        """
        if is_whole(frame_bytes) and self.empty:
            return self._whole(whole_of(frame_bytes, self._max_bytes))
        piece = self._cursor.feed(frame_bytes)
        if isinstance(piece, Chunk):
            view = self._views[piece.tensor]
            view[piece.offset : piece.offset + len(piece.data)] = np.frombuffer(piece.data, np.uint8)
            return None
        if piece is not None:
            self._allocate(piece)
            return None
        assert self._cursor.header is not None
        return self._finish(self._cursor.header)

    @property
    def empty(self) -> bool:
        """Whether no bundle has begun."""
        return self._cursor.header is None

    def _allocate(self, header: types_pb2.TensorHeader) -> None:
        self._tensors = [torch.empty(list(m.shape), dtype=_TORCH_DTYPES[m.dtype]) for m in header.tensors]
        self._views = [_byte_view(tensor) for tensor in self._tensors]

    def _whole(self, whole: types_pb2.TensorBundle) -> Bundle:
        self._allocate(whole.header)
        for view, data in zip(self._views, whole.data, strict=True):
            view[:] = np.frombuffer(data, np.uint8)
        return self._finish(whole.header)

    def _finish(self, header: types_pb2.TensorHeader) -> Bundle:
        for meta, view in zip(header.tensors, self._views, strict=True):
            found = google_crc32c.value(view)
            if found != meta.crc32c:
                raise CorruptTensor(f"tensor {meta.name!r}: crc32c is {found:08x}, the sender's was {meta.crc32c:08x}")
        names = [meta.name for meta in header.tensors]
        bundle = Bundle(dict(zip(names, self._tensors, strict=True)), dict(header.attributes))
        self._cursor = BundleCursor(self._max_bytes)
        self._tensors, self._views = [], []
        return bundle


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().contiguous()
    if tensor.device.type != "cuda":
        return tensor.cpu()
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return pinned.copy_(tensor)


def _byte_view(tensor: torch.Tensor) -> Bytes:
    """The tensor's memory as a flat uint8 array (numpy has no bfloat16, so the view is taken in torch)."""
    view: Bytes = tensor.reshape(-1).view(torch.uint8).numpy()
    return view


def _wire_dtype(name: str, dtype: torch.dtype) -> types_pb2.DType:
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} is {dtype}, which has no form on the wire: convert it first")
    return DTYPES[dtype]
