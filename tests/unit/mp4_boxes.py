"""MP4 files box by box, for what no encoder would write."""

from __future__ import annotations

import struct


def box(kind: bytes, *parts: bytes) -> bytes:
    """A box of that type around the parts."""
    return struct.pack(">I", 8 + sum(map(len, parts))) + kind + b"".join(parts)


def ints(*values: int) -> bytes:
    """Unsigned numbers of 32 bits."""
    return struct.pack(f">{len(values)}I", *values)


def clip_of_claims(samples: int, edits: int = 0) -> bytes:
    """A clip of one byte a frame, which says that it has so many frames, and shows all of them so many times."""
    matrix = ints(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    sample = b"\0" * 6 + b"\0\1" + b"\0" * 16 + struct.pack(">HH", 64, 64) + b"\0" * 46 + b"\0\x18\xff\xff"
    tables = box(
        b"stbl",
        box(b"stsd", ints(0, 1), box(b"mp4v", sample)),
        box(b"stts", ints(0, 1, samples, 1)),
        box(b"stsc", ints(0, 1, 1, samples, 1)),
        box(b"stsz", ints(0, 1, samples)),
        box(b"stco", ints(0, 1, 32)),
    )
    media = box(
        b"mdia",
        box(b"mdhd", ints(0, 0, 0, 1000, samples, 0x55C40000)),
        box(b"hdlr", ints(0, 0), b"vide", b"\0" * 13),
        box(
            b"minf", box(b"vmhd", ints(1, 0, 0)), box(b"dinf", box(b"dref", ints(0, 1), box(b"url ", ints(1)))), tables
        ),
    )
    edit_list = box(b"edts", box(b"elst", ints(0, edits), ints(samples, 0, 0x10000) * edits)) if edits else b""
    track = box(
        b"trak",
        box(b"tkhd", ints(7, 0, 0, 1, 0, samples, *[0] * 4), matrix, ints(64 << 16, 64 << 16)),
        edit_list,
        media,
    )
    header = box(b"mvhd", ints(0, 0, 0, 1000, samples, 0x10000, 0x1000000, 0, 0), matrix, ints(*[0] * 6, 2))
    return box(b"ftyp", b"isom\0\0\2\0isommp41") + box(b"mdat", b"x" * 64) + box(b"moov", header, track)
