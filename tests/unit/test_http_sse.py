"""Streams of events keep their connection alive, and end what they follow when their reader leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from gateway.http_sse import HEARTBEAT, with_heartbeat


class Source:
    """Two texts with a pause between them; knows that it was closed."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s
        self.ended = asyncio.Event()

    async def texts(self) -> AsyncGenerator[str]:
        try:
            yield "one"
            await asyncio.sleep(self.pause_s)
            yield "two"
        finally:
            # As an abort does: it takes some turns of the loop.
            await asyncio.sleep(0.02)
            self.ended.set()


async def test_a_silent_stream_has_heartbeats_between_its_texts() -> None:
    source = Source(0.1)
    seen = [text async for text in with_heartbeat(source.texts(), 0.01)]
    assert [text for text in seen if text != HEARTBEAT] == ["one", "two"]
    assert set(seen[1:4]) == {HEARTBEAT}
    assert source.ended.is_set()


async def test_a_lively_stream_has_none() -> None:
    assert [text async for text in with_heartbeat(Source(0.0).texts(), 5.0)] == ["one", "two"]


async def test_what_breaks_in_a_stream_breaks_its_reader() -> None:
    async def broken() -> AsyncGenerator[str]:
        yield "one"
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        _ = [text async for text in with_heartbeat(broken(), 5.0)]


async def waiting(stream: AsyncIterator[str]) -> None:
    async for _ in stream:
        pass


async def sending(stream: AsyncIterator[str]) -> None:
    await anext(stream)
    await asyncio.sleep(30)


@pytest.mark.parametrize("read", [waiting, sending])
async def test_a_reader_that_is_cancelled_again_and_again_ends_the_source(read) -> None:
    source = Source(30.0)
    reader = asyncio.create_task(read(with_heartbeat(source.texts(), 0.01)))
    await asyncio.sleep(0.05)
    for _ in range(5):
        reader.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await reader
    del reader
    async with asyncio.timeout(5):
        await source.ended.wait()
