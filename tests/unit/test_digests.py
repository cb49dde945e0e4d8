"""Digests that are made as bytes come are those of the whole."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading

import pytest

from gateway.digests import CHUNK_BYTES, WAITING_BYTES, Digests

DATA = random.Random(1).randbytes(2 * CHUNK_BYTES + 1000)


def expected(data: bytes) -> tuple[str, list[str]]:
    chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    return hashlib.sha256(data).hexdigest(), [hashlib.sha256(chunk).hexdigest() for chunk in chunks]


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, len(DATA)])
def test_of_what_is_whole(size):
    assert Digests.of(DATA[:size]).ended() == expected(DATA[:size])


@pytest.mark.parametrize("piece", [len(DATA), CHUNK_BYTES, 1_000_000, 3 * CHUNK_BYTES // 2])
async def test_of_pieces(piece):
    digests = Digests()
    for start in range(0, len(DATA), piece):
        await digests.add(DATA[start : start + piece])
    # A write that is tried again asks again.
    assert digests.ended() == digests.ended() == expected(DATA)
    digests.close()


async def test_what_comes_faster_than_it_is_hashed_waits_and_the_loop_goes_on(monkeypatch):
    go_on, hash_now = threading.Event(), Digests._take
    monkeypatch.setattr(Digests, "_take", lambda *taken: go_on.wait(20) and hash_now(*taken))
    digests, added = Digests(), 0
    piece = DATA[:CHUNK_BYTES]

    async def add() -> None:
        nonlocal added
        for _ in range(4 * WAITING_BYTES // CHUNK_BYTES):
            added += len(piece)
            await digests.add(piece)

    adding = asyncio.create_task(add())
    await asyncio.sleep(0.1)
    assert added == WAITING_BYTES and not adding.done()
    go_on.set()
    await adding
    assert digests.ended() == expected(added // CHUNK_BYTES * piece)
    digests.close()
