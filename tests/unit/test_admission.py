"""Who may run beside whom at a stage: one that runs alone waits for all others, and all that come later wait for it."""

from __future__ import annotations

import asyncio
import contextlib

from protos.types_pb2 import RequestContext
from services.admission import Admission


class Place:
    """A call that holds its place until it is told to end."""

    def __init__(self, admission: Admission, request_id: str, *, alone: bool = False) -> None:
        self.inside = False
        self._ended = asyncio.Event()
        self._task = asyncio.create_task(self._hold(admission, RequestContext(request_id=request_id, alone=alone)))

    async def _hold(self, admission: Admission, context: RequestContext) -> None:
        async with admission.place(context):
            self.inside = True
            await self._ended.wait()
        self.inside = False

    async def end(self) -> None:
        self._ended.set()
        await self._task

    async def leave(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


async def inside(*places: Place) -> list[bool]:
    for _ in range(10):
        await asyncio.sleep(0)
    return [place.inside for place in places]


async def test_one_that_runs_alone_has_nobody_beside_it() -> None:
    admission = Admission(8)
    first, second = Place(admission, "a"), Place(admission, "b")
    assert await inside(first, second) == [True, True]
    alone, later, again = Place(admission, "c", alone=True), Place(admission, "d"), Place(admission, "e", alone=True)
    await first.end()
    assert await inside(second, alone, later, again) == [True, False, False, False]
    await second.end()
    assert await inside(alone, later, again) == [True, False, False]
    await alone.end()
    assert await inside(later, again) == [True, False]
    await later.end()
    assert await inside(again) == [True]
    await again.end()


async def test_calls_of_one_request_do_not_wait_for_each_other() -> None:
    admission = Admission(8)
    encode, decode = Place(admission, "a", alone=True), Place(admission, "a", alone=True)
    assert await inside(encode, decode) == [True, True]
    await encode.end()
    await decode.end()


async def test_one_that_leaves_while_it_waits_holds_nobody_up() -> None:
    admission = Admission(8)
    first, alone, later = Place(admission, "a"), Place(admission, "b", alone=True), Place(admission, "c")
    assert await inside(first, alone, later) == [True, False, False]
    await alone.leave()
    assert await inside(later) == [True]
    await first.end()
    await later.end()
