"""Request bodies are refused when too many bytes of them are held, and one alone never is."""

from __future__ import annotations

import asyncio

import pytest
from starlette.exceptions import HTTPException

from gateway.http_bodies import BodyCredits


class Caller:
    """A call whose body comes in pieces of 10 bytes; the app reads them and then waits to be told to answer."""

    def __init__(self, app: BodyCredits, pieces: int) -> None:
        self.answer = asyncio.Event()
        self.read = 0
        self._left = pieces
        self.task = asyncio.create_task(app({"type": "http", "caller": self}, self._receive, self._send))

    async def _receive(self) -> dict[str, object]:
        self._left -= 1
        return {"type": "http.request", "body": bytes(10), "more_body": self._left > 0}

    async def _send(self, message: dict[str, object]) -> None:
        raise AssertionError(message)


async def application(scope, receive, send) -> None:
    caller = scope["caller"]
    more = True
    while more:
        more = (await receive())["more_body"]
        caller.read += 10
    await caller.answer.wait()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_crowd_of_bodies_does_not_keep_others_from_their_turn() -> None:
    app = BodyCredits(application, max_bytes=10_000, timeout_s=60.0)
    crowd = [Caller(app, 1) for _ in range(100)]
    read = []
    while sum(caller.read for caller in crowd) < 1000:
        read.append(sum(caller.read for caller in crowd))
        await asyncio.sleep(0)
    assert max(after - before for before, after in zip(read, read[1:], strict=False)) <= 10
    for caller in crowd:
        caller.answer.set()
        await caller.task


async def test_bodies_are_bounded_until_their_calls_are_answered() -> None:
    app = BodyCredits(application, max_bytes=30, timeout_s=60.0)
    first, second, third = Caller(app, 2), Caller(app, 1), Caller(app, 1)
    with pytest.raises(HTTPException, match="too many large requests"):
        await third.task
    await settle()
    assert (first.read, second.read, third.read) == (20, 10, 0)
    first.answer.set()
    await first.task
    fourth = Caller(app, 2)
    fourth.answer.set()
    await fourth.task
    second.answer.set()
    await second.task


async def test_one_alone_is_never_refused() -> None:
    app = BodyCredits(application, max_bytes=30, timeout_s=60.0)
    for _ in range(2):
        only = Caller(app, 9)
        only.answer.set()
        await only.task
        assert only.read == 90
