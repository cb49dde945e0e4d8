"""How many parts a picture's file has, counted before Pillow looks at them one by one.

Parts of a few bytes are cheap to send and dear to read: seven seconds for a JPEG of 7 MiB, while a gateway that reads
its header does nothing else.
"""

from __future__ import annotations

from services.errors import InvalidRequest

# libpng writes 8 KiB of pixels into one: a file of 7 MiB has less than a thousand.
MAX_PNG_CHUNKS = 10_000
# What stands before the pixels. A colour profile has up to 255 segments, of 64 KiB at most.
MAX_JPEG_SEGMENTS = 1000
MAX_JPEG_HEADER_BYTES = 2 * 1024 * 1024

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_JPEG_SCAN = 0xDA
_JPEG_BARE = (0x01, *range(0xD0, 0xDA))


def check_parts(data: bytes) -> None:
    """Counts the chunks of a PNG and the segments before the pixels of a JPEG; WebP has a reader in C.

    Raises:
        InvalidRequest: there are more than a picture needs.
    """
    if data.startswith(_PNG):
        _check_chunks(data)
    elif data.startswith(_JPEG):
        _check_segments(data)


def _check_chunks(data: bytes) -> None:
    place, chunks = len(_PNG), 0
    while place < len(data):
        chunks += 1
        if chunks > MAX_PNG_CHUNKS:
            raise InvalidRequest(
                f"an input picture has more than {MAX_PNG_CHUNKS} PNG chunks: save it without metadata", param="inputs"
            )
        # Length, type and checksum stand around what is in it.
        place += 12 + int.from_bytes(data[place : place + 4])


def _check_segments(data: bytes) -> None:
    place, segments = len(_JPEG), 0
    while place + 1 < len(data):
        # A byte that fills or is out of place costs a reader as much as a segment.
        segments += 1
        if segments > MAX_JPEG_SEGMENTS or place > MAX_JPEG_HEADER_BYTES:
            raise InvalidRequest(
                f"an input picture has more than {MAX_JPEG_SEGMENTS} segments, or {MAX_JPEG_HEADER_BYTES} bytes, "
                "before its pixels: save it without metadata",
                param="inputs",
            )
        mark, kind = data[place : place + 2]
        if mark != 0xFF or kind == 0xFF:
            place += 1
        elif kind == _JPEG_SCAN:
            return
        elif not kind or kind in _JPEG_BARE:
            place += 2
        else:
            place += 2 + max(2, int.from_bytes(data[place + 2 : place + 4]))
