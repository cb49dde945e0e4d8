"""The bytes of tensor frames, without torch: splitting, building and following bundles.

A bundle is a header, chunks and an end, each the `TensorFrame` in field 2 of a streaming message, with nothing beside
it (`protos/types.proto`); a small one travels as a single frame, because every message costs three processes a wake-up.
So a relay needs only `frame_of` and `is_end`, and a store only `BundleCursor`; the torch side (`services/tensors.py`)
builds on the same cursor. Chunks are split by hand, because parsing would copy them twice; tests hold the bytes equal
to what protobuf writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from protos import types_pb2
from services.errors import CorruptTensor

CHUNK_BYTES = 1024 * 1024
# A bundle of no more bytes is sent whole.
WHOLE_BYTES = 256 * 1024
MAX_TENSORS = 1024
MAX_DIMS = 8
MAX_NAME_CHARS = 256
MAX_HEADER_BYTES = 1024 * 1024
MAX_BUNDLE_BYTES = 4 * 1024**3

ITEM_BYTES = {
    types_pb2.DTYPE_FLOAT32: 4,
    types_pb2.DTYPE_FLOAT16: 2,
    types_pb2.DTYPE_BFLOAT16: 2,
    types_pb2.DTYPE_FLOAT8_E4M3: 1,
    types_pb2.DTYPE_INT64: 8,
    types_pb2.DTYPE_INT32: 4,
    types_pb2.DTYPE_UINT8: 1,
    types_pb2.DTYPE_BOOL: 1,
}

# Tags of length-delimited fields: (number << 3) | 2.
_FRAME_TAG = 0x12
_HEADER_TAG, _CHUNK_TAG, _END_TAG, _WHOLE_TAG = 0x0A, 0x12, 0x1A, 0x22
_DATA_TAG = 0x7A
_TENSOR_TAG, _OFFSET_TAG = 0x08, 0x10

_END_FRAME = bytes((_END_TAG, 0))


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of tensor number `tensor` of its bundle, from byte `offset` on. `data` is a view, not a copy."""

    tensor: int
    offset: int
    data: memoryview


def frame_of(message: bytes | memoryview) -> memoryview | None:
    """The TensorFrame in a streaming message, as a view; None when the message holds something else.

    Not for unary requests, whose field 2 is another.

    Raises:
        CorruptTensor: field 2 is cut short, or something stands beside it.
    """
    view = memoryview(message)
    if not view or view[0] != _FRAME_TAG:
        return None
    start, end = _span(view, 1)
    if end != len(view):
        raise CorruptTensor(f"a message of {len(view)} bytes holds a tensor frame that ends at byte {end}")
    return view[start:end]


def message_of(frame: bytes | memoryview) -> bytes:
    """A whole streaming message around a frame; the same bytes fit every stage's stream."""
    return b"".join((bytes((_FRAME_TAG,)), _varint(len(frame)), frame))


def is_header(frame: bytes | memoryview) -> bool:
    """Whether the frame opens a bundle."""
    return len(frame) > 0 and frame[0] == _HEADER_TAG


def is_end(frame: bytes | memoryview) -> bool:
    """Whether the frame closes a bundle: its last one, or its only one."""
    return len(frame) > 0 and frame[0] in (_END_TAG, _WHOLE_TAG)


def is_whole(frame: bytes | memoryview) -> bool:
    """Whether the frame is a bundle by itself."""
    return len(frame) > 0 and frame[0] == _WHOLE_TAG


def header_message(header: types_pb2.TensorHeader) -> bytes:
    """The message that opens a bundle."""
    return message_of(types_pb2.TensorFrame(header=header).SerializeToString())


def chunk_message(tensor: int, offset: int, data: bytes | memoryview) -> bytes:
    """The message with one chunk; `data` (any contiguous buffer of bytes) is copied once."""
    place = (bytes((_TENSOR_TAG,)) + _varint(tensor) if tensor else b"") + (
        bytes((_OFFSET_TAG,)) + _varint(offset) if offset else b""
    )
    chunk = place + bytes((_DATA_TAG,)) + _varint(len(data))
    frame = bytes((_CHUNK_TAG,)) + _varint(len(chunk) + len(data)) + chunk
    return b"".join((bytes((_FRAME_TAG,)), _varint(len(frame) + len(data)), frame, data))


def end_message() -> bytes:
    """The message that closes a bundle."""
    return message_of(_END_FRAME)


def whole_message(header: types_pb2.TensorHeader, data: Sequence[bytes]) -> bytes:
    """The message with a whole bundle; `data` has the bytes of each tensor."""
    whole = types_pb2.TensorBundle(header=header, data=data)
    return message_of(types_pb2.TensorFrame(whole=whole).SerializeToString())


def whole_of(frame: bytes | memoryview, max_bytes: int) -> types_pb2.TensorBundle:
    """The bundle in a frame, its header and sizes checked.

    Raises:
        CorruptTensor: malformed, or larger than allowed.
    """
    try:
        parsed = types_pb2.TensorFrame.FromString(bytes(frame))
    except DecodeError as error:
        raise CorruptTensor("a whole tensor bundle cannot be parsed") from error
    if parsed.WhichOneof("kind") != "whole":
        raise CorruptTensor("a tensor frame holds more than a whole bundle")
    header, data = parsed.whole.header, parsed.whole.data
    check_header(header, max_bytes)
    if [len(part) for part in data] != [meta.nbytes for meta in header.tensors]:
        raise CorruptTensor("the tensors of a whole bundle have other sizes than its header announced")
    return parsed.whole


def chunk_of(frame: bytes | memoryview) -> Chunk:
    """Splits a chunk's frame without copying its data.

    Raises:
        CorruptTensor: it is no chunk, or malformed.
    """
    view = memoryview(frame)
    if not view or view[0] != _CHUNK_TAG:
        raise CorruptTensor("a tensor frame holds neither header, chunk nor end")
    start, end = _span(view, 1)
    if end != len(view):
        raise CorruptTensor("a tensor frame holds more than a chunk")
    tensor = offset = 0
    data = view[0:0]
    position = start
    while position < end:
        tag = view[position]
        if tag == _DATA_TAG:
            first, position = _span(view, position + 1)
            data = view[first:position]
        elif tag in (_TENSOR_TAG, _OFFSET_TAG):
            value, position = _read_varint(view, position + 1)
            tensor, offset = (value, offset) if tag == _TENSOR_TAG else (tensor, value)
        else:
            raise CorruptTensor(f"a tensor chunk has an unknown field (tag {tag})")
    return Chunk(tensor, offset, data)


class BundleCursor:
    """Follows one bundle frame by frame: order, sizes and limits are checked, nothing is kept but the header.

    Args:
        max_bytes: how many bytes the bundle's tensors may have together.
    """

    def __init__(self, max_bytes: int = MAX_BUNDLE_BYTES) -> None:
        self.header: types_pb2.TensorHeader | None = None
        self.ended = False
        self._max_bytes = max_bytes
        self._tensor = 0
        self._offset = 0

    def feed(self, frame: bytes | memoryview) -> types_pb2.TensorHeader | Chunk | None:
        """Takes the next frame; returns its header, its chunk, or None at the end.

        Raises:
            CorruptTensor: out of order, cut short, malformed or larger than allowed.
        """
        if self.ended:
            raise CorruptTensor("a tensor frame follows the end of its bundle")
        if is_header(frame):
            return self._open(frame)
        if self.header is None:
            raise CorruptTensor("a tensor bundle does not start with its header")
        if is_whole(frame):
            raise CorruptTensor("a whole tensor bundle comes inside another one")
        if is_end(frame):
            self._skip_finished()
            if self._tensor < len(self.header.tensors):
                raise CorruptTensor(f"a tensor bundle ends inside {self.header.tensors[self._tensor].name!r}")
            self.ended = True
            return None
        return self._advance(chunk_of(frame))

    def _open(self, frame: bytes | memoryview) -> types_pb2.TensorHeader:
        if self.header is not None:
            raise CorruptTensor("a tensor bundle has two headers")
        if len(frame) > MAX_HEADER_BYTES:
            raise CorruptTensor(f"a tensor header has {len(frame)} bytes: at most {MAX_HEADER_BYTES} are allowed")
        try:
            header = types_pb2.TensorFrame.FromString(bytes(frame)).header
        except DecodeError as error:
            raise CorruptTensor("a tensor header cannot be parsed") from error
        check_header(header, self._max_bytes)
        self.header = header
        return header

    def _advance(self, chunk: Chunk) -> Chunk:
        assert self.header is not None
        self._skip_finished()
        if self._tensor == len(self.header.tensors):
            raise CorruptTensor("a tensor bundle has more chunks than its header announced")
        meta = self.header.tensors[self._tensor]
        if (chunk.tensor, chunk.offset) != (self._tensor, self._offset):
            raise CorruptTensor(
                f"a chunk of tensor {chunk.tensor} at byte {chunk.offset} came where tensor {self._tensor} "
                f"({meta.name!r}) continues at byte {self._offset}"
            )
        if not 0 < len(chunk.data) <= min(CHUNK_BYTES, meta.nbytes - self._offset):
            raise CorruptTensor(f"a chunk of {meta.name!r} at byte {chunk.offset} has {len(chunk.data)} bytes")
        self._offset += len(chunk.data)
        return chunk

    def _skip_finished(self) -> None:
        assert self.header is not None
        tensors = self.header.tensors
        while self._tensor < len(tensors) and self._offset == tensors[self._tensor].nbytes:
            self._tensor += 1
            self._offset = 0


def check_header(header: types_pb2.TensorHeader, max_bytes: int) -> None:
    """Checks what a header announces, before anything is allocated.

    Raises:
        CorruptTensor: names the tensor and what is wrong with it.
    """
    if len(header.tensors) > MAX_TENSORS:
        raise CorruptTensor(f"a tensor bundle announces {len(header.tensors)} tensors: at most {MAX_TENSORS} fit")
    names = set()
    for meta in header.tensors:
        if not meta.name or len(meta.name) > MAX_NAME_CHARS or meta.name in names:
            raise CorruptTensor(f"tensor name {meta.name[:MAX_NAME_CHARS]!r} is empty, too long or used twice")
        names.add(meta.name)
        if meta.dtype not in ITEM_BYTES:
            raise CorruptTensor(f"tensor {meta.name!r} has the unknown dtype {meta.dtype}")
        if len(meta.shape) > MAX_DIMS or any(size < 0 for size in meta.shape):
            raise CorruptTensor(f"tensor {meta.name!r} has the shape {list(meta.shape)[: MAX_DIMS + 1]}")
        nbytes = math.prod(meta.shape) * ITEM_BYTES[meta.dtype]
        if nbytes != meta.nbytes:
            raise CorruptTensor(
                f"tensor {meta.name!r} of shape {list(meta.shape)} has {nbytes} bytes, not {meta.nbytes}"
            )
    total = sum(meta.nbytes for meta in header.tensors)
    if total > max_bytes:
        raise CorruptTensor(f"a tensor bundle announces {total} bytes: at most {max_bytes} are allowed")


def chunk_offsets(nbytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of a tensor's chunks."""
    for start in range(0, nbytes, CHUNK_BYTES):
        yield start, min(start + CHUNK_BYTES, nbytes)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(view) and shift < 64:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise CorruptTensor("a tensor frame is cut inside a number")


def _span(view: memoryview, position: int) -> tuple[int, int]:
    """Start and end of a length-delimited field whose length stands at `position`."""
    length, start = _read_varint(view, position)
    if start + length > len(view):
        raise CorruptTensor(f"a tensor frame is cut short: {start + length - len(view)} bytes are missing")
    return start, start + length
