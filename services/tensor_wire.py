"""Tensor frames as bytes, without torch: what a gateway needs to relay and keep bundles it never looks into.

A bundle is header, chunks, end (protos/types.proto). Every streaming message carries its TensorFrame in field 2, so a
serialised message that begins with the tag of field 2 is a frame, and the same bytes are valid in every other stream.
"""

from __future__ import annotations

# Field 2, wire type 2 (length-delimited).
FRAME_TAG = 0x12
# Inside a TensorFrame: header is field 1, chunk field 2, end field 3.
HEADER_TAG, CHUNK_TAG, END_TAG = 0x0A, 0x12, 0x1A

CHUNK_BYTES = 1024 * 1024
# Of a whole message; gRPC's own cap is 16 MiB.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024


def is_frame(message: bytes) -> bool:
    """Whether a serialised streaming message is a tensor frame."""
    return message[:1] == b"\x12"


def frame_of(message: bytes) -> memoryview | None:
    """The TensorFrame inside a serialised message, without a copy; None when it is something else."""
    if not is_frame(message):
        return None
    length, start = _varint(message, 1)
    view = memoryview(message)[start:]
    return view if len(view) == length else None


def is_end(message: bytes) -> bool:
    """Whether the message closes a bundle."""
    frame = frame_of(message)
    return frame is not None and len(frame) > 0 and frame[0] == END_TAG


def frame_message(frame: bytes) -> bytes:
    """A TensorFrame as a message of any stream."""
    return bytes((FRAME_TAG,)) + varint(len(frame)) + frame


def chunk_message(tensor: int, offset: int, data: memoryview) -> bytes:
    """A chunk as a message, with one copy of `data` (a generated class would make three)."""
    meta = (b"\x08" + varint(tensor) if tensor else b"") + (b"\x10" + varint(offset) if offset else b"")
    chunk_head = meta + b"\x7a" + varint(len(data))
    frame_head = bytes((CHUNK_TAG,)) + varint(len(chunk_head) + len(data)) + chunk_head
    return b"".join((bytes((FRAME_TAG,)), varint(len(frame_head) + len(data)), frame_head, data))


def end_message() -> bytes:
    """The end of a bundle as a message."""
    return bytes((FRAME_TAG, 2, END_TAG, 0))


def varint(value: int) -> bytes:
    """Protobuf's variable-length integer."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(data: bytes, start: int) -> tuple[int, int]:
    value = shift = 0
    for index in range(start, min(start + 10, len(data))):
        value |= (data[index] & 0x7F) << shift
        if data[index] < 0x80:
            return value, index + 1
        shift += 7
    return -1, start
