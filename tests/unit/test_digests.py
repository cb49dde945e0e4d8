"""Digests that are made as bytes come are those of the whole."""

from __future__ import annotations

import hashlib
import random

import pytest

from gateway.digests import CHUNK_BYTES, Digests

DATA = random.Random(1).randbytes(2 * CHUNK_BYTES + 1000)


def expected(data: bytes) -> tuple[str, list[str]]:
    chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    return hashlib.sha256(data).hexdigest(), [hashlib.sha256(chunk).hexdigest() for chunk in chunks]


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, len(DATA)])
def test_of_what_is_whole(size):
    assert Digests.of(DATA[:size]).ended() == expected(DATA[:size])


@pytest.mark.parametrize("piece", [len(DATA), CHUNK_BYTES, 1_000_000, 3 * CHUNK_BYTES // 2])
def test_of_pieces(piece):
    digests = Digests()
    for start in range(0, len(DATA), piece):
        digests.add(DATA[start : start + piece])
    # A write that is tried again asks again.
    assert digests.ended() == digests.ended() == expected(DATA)
    digests.close()
