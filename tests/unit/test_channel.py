"""Frames between two real sockets: whole, in order, bounded, and honest about the end."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from services.channel import (
    HEADER,
    MAX_FRAME_BYTES,
    AsyncChannel,
    BlockingChannel,
    ChannelBroken,
    Fatal,
    Frame,
    FrameQueue,
    Kind,
    OpenCall,
    error_from_bytes,
    error_to_bytes,
)
from services.errors import InvalidRequest

Pair = tuple[socket.socket, socket.socket]
SOME = [
    Frame(Kind.OPEN, 1, b"{}"),
    Frame(Kind.MESSAGE, 2**64 - 1, bytes(range(256)) * 9000),
    Frame(Kind.HALF_CLOSE, 3, b""),
    Frame(Kind.MESSAGE, 4, b"x" * MAX_FRAME_BYTES),
    *(Frame(Kind.STATUS, 0, bytes([index])) for index in range(200)),
]


@pytest.fixture
def ends() -> Iterator[Pair]:
    pair = socket.socketpair()
    yield pair
    for end in pair:
        end.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_front_to_rank(ends: Pair) -> None:
    front = AsyncChannel(ends[0], lambda frame: None, lambda: None)
    rank = BlockingChannel(ends[1])
    reader = asyncio.create_task(asyncio.to_thread(lambda: [rank.receive() for _ in SOME]))
    for frame in SOME:
        front.send(*frame)
        await front.drained()
    assert await reader == SOME
    front.close()
    assert await asyncio.to_thread(rank.receive) is None


async def test_rank_to_front(ends: Pair) -> None:
    got: list[Frame] = []
    closed: list[bool] = []
    AsyncChannel(ends[0], got.append, lambda: closed.append(True))
    await asyncio.to_thread(BlockingChannel(ends[1]).send, SOME)
    await until(lambda: len(got) == len(SOME))
    assert got == SOME and not closed
    ends[1].close()
    await until(lambda: bool(closed))


async def test_a_front_that_pauses_holds_the_rank(ends: Pair) -> None:
    got: list[Frame] = []
    front = AsyncChannel(ends[0], got.append, lambda: None)
    front.pause()
    frame = Frame(Kind.MESSAGE, 1, b"x" * 1_000_000)
    writer = asyncio.create_task(asyncio.to_thread(BlockingChannel(ends[1]).send, [frame] * 20))
    await asyncio.sleep(0.2)
    assert not writer.done() and not got
    front.resume()
    await writer
    await until(lambda: len(got) == 20)


async def test_a_rank_that_does_not_read_holds_the_front(ends: Pair) -> None:
    front = AsyncChannel(ends[0], lambda frame: None, lambda: None)
    for _ in range(12):
        front.send(Kind.MESSAGE, 1, b"x" * 1_000_000)
    waiting = asyncio.create_task(front.drained())
    await asyncio.sleep(0.1)
    assert not waiting.done()
    rank = BlockingChannel(ends[1])
    await asyncio.to_thread(lambda: [rank.receive() for _ in range(12)])
    await asyncio.wait_for(waiting, 5)


async def test_the_last_words_of_a_dead_rank_are_heard(ends: Pair) -> None:
    got: list[Frame] = []
    front = AsyncChannel(ends[0], got.append, lambda: None)
    front.pause()
    fatal = Frame(Kind.FATAL, 0, Fatal(True, "no weights").to_bytes())
    BlockingChannel(ends[1]).send([fatal])
    ends[1].close()
    front.read_rest()
    assert got == [fatal] and front.closed
    front.send(Kind.CANCEL, 1)
    assert Fatal.from_bytes(got[0].payload) == Fatal(True, "no weights")


@pytest.mark.parametrize("header", [HEADER.pack(1, 99, 0), HEADER.pack(MAX_FRAME_BYTES + 1, Kind.MESSAGE, 1)])
async def test_what_is_no_frame_breaks_the_channel(header: bytes) -> None:
    closed: list[bool] = []
    ours, theirs = socket.socketpair()
    AsyncChannel(ours, lambda frame: None, lambda: closed.append(True))
    theirs.sendall(header)
    await until(lambda: bool(closed))
    theirs.close()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(header)
        with pytest.raises(ChannelBroken):
            BlockingChannel(ours).receive()


def test_a_frame_that_is_cut_is_an_end(ends: Pair) -> None:
    ends[1].sendall(HEADER.pack(100, Kind.MESSAGE, 1) + b"x" * 50)
    ends[1].close()
    assert BlockingChannel(ends[0]).receive() is None


def test_a_frame_too_large_is_not_sent(ends: Pair) -> None:
    with pytest.raises(ValueError, match="at most"):
        BlockingChannel(ends[0]).send([Frame(Kind.MESSAGE, 1, b"x" * (MAX_FRAME_BYTES + 1))])


def test_queue_holds_the_writer_until_there_is_room() -> None:
    queue = FrameQueue(max_bytes=100)
    large, small = Frame(Kind.MESSAGE, 1, b"x" * 500), Frame(Kind.MESSAGE, 2, b"y")
    queue.put(large)
    writer = threading.Thread(target=queue.put, args=(small,))
    writer.start()
    writer.join(0.15)
    assert writer.is_alive()
    assert queue.take(0) == [large]
    writer.join(5)
    assert queue.take(1.0) == [small]
    assert queue.take(0) == []


def test_queue_forgets_what_nobody_wants_and_ends() -> None:
    queue = FrameQueue(max_bytes=1)
    queue.put(Frame(Kind.MESSAGE, 1, b"first"))
    queue.put(Frame(Kind.MESSAGE, 1, b"dropped"), dropped=lambda: True)
    assert [frame.payload for frame in queue.take(0)] == [b"first"]
    started_s = time.monotonic()
    threading.Timer(0.1, queue.close).start()
    assert queue.take(None) == [] and time.monotonic() - started_s < 5


def test_payloads_survive() -> None:
    opened = OpenCall("Denoise", "r1", "00-x", 12.5, 7)
    assert OpenCall.from_bytes(opened.to_bytes()) == opened
    error = error_from_bytes(error_to_bytes(InvalidRequest("no", param="steps", request_id="r")))
    assert (type(error), error.message, error.param, error.request_id) == (InvalidRequest, "no", "steps", "r")
