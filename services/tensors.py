"""Tensors to bundles of frames and back: the torch side of the tensor transport.

Frames carry raw little-endian bytes with one crc32c a tensor. Everything a peer says is checked before memory is
taken for it; nothing is ever unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import google_crc32c
import numpy as np
import torch
from google.protobuf.message import DecodeError

from protos import types_pb2
from services.errors import CorruptTensor
from services.tensor_wire import CHUNK_BYTES, chunk_message, end_message, frame_message, frame_of

MAX_TENSORS = 4096
MAX_DIMS = 8
MAX_BUNDLE_BYTES = 8 * 1024**3

_DTYPES = {
    types_pb2.DTYPE_FLOAT32: torch.float32,
    types_pb2.DTYPE_FLOAT16: torch.float16,
    types_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    types_pb2.DTYPE_FLOAT8_E4M3: torch.float8_e4m3fn,
    types_pb2.DTYPE_INT64: torch.int64,
    types_pb2.DTYPE_INT32: torch.int32,
    types_pb2.DTYPE_UINT8: torch.uint8,
    types_pb2.DTYPE_BOOL: torch.bool,
}
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Bundle:
    """Named tensors that travelled together, on the CPU."""

    tensors: dict[str, torch.Tensor]
    attributes: dict[str, str] = field(default_factory=dict)


def bundle_frames(tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, str] | None = None) -> Iterator[bytes]:
    """The messages of a bundle, ready for any stream."""
    views = [_bytes_of(tensor) for tensor in tensors.values()]
    metas = [
        types_pb2.TensorMeta(
            name=name,
            dtype=_NUMBERS[tensor.dtype],
            shape=list(tensor.shape),
            nbytes=len(view),
            crc32c=google_crc32c.value(view),
        )
        for (name, tensor), view in zip(tensors.items(), views, strict=True)
    ]
    header = types_pb2.TensorHeader(tensors=metas, attributes=dict(attributes or {}))
    yield frame_message(types_pb2.TensorFrame(header=header).SerializeToString())
    for index, view in enumerate(views):
        for offset in range(0, len(view), CHUNK_BYTES):
            yield chunk_message(index, offset, view[offset : offset + CHUNK_BYTES].data)
    yield end_message()


class BundleReader:
    """Puts a bundle together from messages. One reader per stream; it starts anew after each bundle."""

    def __init__(self, max_bytes: int = MAX_BUNDLE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._reset()

    @property
    def in_bundle(self) -> bool:
        """Whether a bundle has begun and not ended."""
        return self._metas is not None

    def feed(self, message: bytes) -> Bundle | None:
        """Takes a serialised message that holds a frame; returns the bundle when this was its end.

        Raises:
            CorruptTensor: cut, out of order, too large, or with a wrong checksum.
        """
        view = frame_of(message)
        if view is None:
            raise CorruptTensor("a tensor frame was expected and something else came")
        try:
            frame = types_pb2.TensorFrame.FromString(bytes(view))
        except DecodeError as error:
            raise CorruptTensor(f"a tensor frame cannot be parsed: {error}") from error
        match frame.WhichOneof("kind"):
            case "header":
                self._begin(frame.header)
            case "chunk":
                self._add(frame.chunk)
            case "end":
                return self._finish()
            case _:
                raise CorruptTensor("a tensor frame is empty")
        return None

    def _reset(self) -> None:
        self._metas: list[types_pb2.TensorMeta] | None = None
        self._attributes: dict[str, str] = {}
        self._buffers: list[np.ndarray] = []
        self._tensor = 0
        self._offset = 0

    def _begin(self, header: types_pb2.TensorHeader) -> None:
        if self._metas is not None:
            raise CorruptTensor("a tensor bundle began before the last one ended")
        if len(header.tensors) > MAX_TENSORS:
            raise CorruptTensor(f"a bundle has {len(header.tensors)} tensors: at most {MAX_TENSORS} are allowed")
        total = 0
        for meta in header.tensors:
            _check_meta(meta)
            total += meta.nbytes
        if total > self._max_bytes:
            raise CorruptTensor(f"a bundle has {total} bytes: at most {self._max_bytes} are allowed")
        self._metas = list(header.tensors)
        if len({meta.name for meta in self._metas}) < len(self._metas):
            raise CorruptTensor("two tensors of a bundle have the same name")
        self._attributes = dict(header.attributes)
        self._buffers = [np.empty(meta.nbytes, np.uint8) for meta in self._metas]
        self._skip_complete()

    def _add(self, chunk: types_pb2.TensorChunk) -> None:
        if self._metas is None:
            raise CorruptTensor("a tensor chunk came before its header")
        if chunk.tensor != self._tensor or chunk.offset != self._offset or self._tensor >= len(self._metas):
            raise CorruptTensor(
                f"a chunk of tensor {chunk.tensor} at byte {chunk.offset} came, but tensor {self._tensor} at byte "
                f"{self._offset} is next"
            )
        data = chunk.data
        end = self._offset + len(data)
        if not data or end > len(self._buffers[self._tensor]):
            raise CorruptTensor(f"a chunk of {len(data)} bytes does not fit into tensor {self._tensor}")
        self._buffers[self._tensor][self._offset : end] = np.frombuffer(data, np.uint8)
        self._offset = end
        self._skip_complete()

    def _skip_complete(self) -> None:
        while self._tensor < len(self._buffers) and self._offset == len(self._buffers[self._tensor]):
            self._tensor += 1
            self._offset = 0

    def _finish(self) -> Bundle:
        if self._metas is None or self._tensor < len(self._metas):
            raise CorruptTensor("a tensor bundle ended before all its bytes had come")
        tensors = {}
        for meta, buffer in zip(self._metas, self._buffers, strict=True):
            if google_crc32c.value(buffer) != meta.crc32c:
                raise CorruptTensor(f"tensor {meta.name!r} failed its checksum")
            dtype = _DTYPES[meta.dtype]
            flat = torch.from_numpy(buffer).view(dtype) if meta.nbytes else torch.empty(0, dtype=dtype)
            tensors[meta.name] = flat.reshape(tuple(meta.shape))
        bundle = Bundle(tensors, self._attributes)
        self._reset()
        return bundle


def _check_meta(meta: types_pb2.TensorMeta) -> None:
    if meta.dtype not in _DTYPES:
        raise CorruptTensor(f"tensor {meta.name!r} has the unknown dtype {meta.dtype}")
    if len(meta.shape) > MAX_DIMS or any(size < 0 for size in meta.shape):
        raise CorruptTensor(f"tensor {meta.name!r} has the shape {list(meta.shape)}: at most {MAX_DIMS} sizes >= 0")
    expected = math.prod(meta.shape) * _DTYPES[meta.dtype].itemsize
    if meta.nbytes != expected:
        raise CorruptTensor(f"tensor {meta.name!r} has {meta.nbytes} bytes, but its shape needs {expected}")


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype not in _NUMBERS:
        raise TypeError(f"dtype {tensor.dtype} has no number on the wire")
    if tensor.numel() == 0:
        return np.empty(0, np.uint8)
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    array: np.ndarray = flat.view(torch.uint8).numpy()
    return array
