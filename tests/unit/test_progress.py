"""Progress events reach Redis in order, one at a time, however slow it is."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from gateway.records import Claim
from gateway.work import EVENTS_A_SECOND, Progress
from protos import dit_pb2, types_pb2
from services.errors import StateStoreDown

TOTAL = 50


class SlowState:
    """Takes beats when it is let; the first ones slower than the later ones."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.down = False
        self.told: list[tuple[str, int, bytes]] = []
        self.told_s: list[float] = []
        self.under_way = 0

    async def beat(self, _claim: Claim, _lease_s: float, *, kind: str, payload: bytes, step: int, total: int) -> str:
        self.under_way += 1
        assert self.under_way == 1
        self.told_s.append(time.monotonic())
        await self.open.wait()
        await asyncio.sleep(0.02 / (len(self.told) + 1))
        self.under_way -= 1
        if self.down:
            raise StateStoreDown("away")
        self.told.append((kind, step, payload if kind == "preview" else b""))
        return "running"


def progress_to(state: SlowState) -> Progress:
    return Progress(cast(Any, state), Claim("r", 1, {}, "", 0), 10.0)


def step(progress: Progress, number: int) -> None:
    # As if the last event had been sent long ago.
    progress._sent_s = 0.0
    progress.step(dit_pb2.StepEvent(step=number, total=TOTAL))


async def test_the_newest_step_is_told_after_what_is_under_way() -> None:
    state = SlowState()
    progress = progress_to(state)
    step(progress, 1)
    await asyncio.sleep(0)
    for number in range(2, TOTAL + 1):
        step(progress, number)
    state.open.set()
    await progress.close()
    assert [number for _, number, _ in state.told] == [1, TOTAL]


async def test_steps_and_previews_keep_their_order_and_the_oldest_previews_go() -> None:
    state = SlowState()
    progress = progress_to(state)
    step(progress, 1)
    await asyncio.sleep(0)
    for number in range(20):
        progress.preview(types_pb2.Media(data=b"%d" % number))
    step(progress, TOTAL)
    state.open.set()
    await progress.close()
    previews = [types_pb2.Media.FromString(payload).data for kind, _, payload in state.told if kind == "preview"]
    assert previews == [b"19"]
    assert [state.told[0][1], state.told[-1][1]] == [1, TOTAL]


async def test_no_second_has_more_than_five_events_and_each_kind_gets_its_turn() -> None:
    state = SlowState()
    state.open.set()
    progress = progress_to(state)
    for number in range(1, TOTAL):
        step(progress, number)
        progress.preview(types_pb2.Media(data=b"%d" % number))
        await asyncio.sleep(0.05)
    told_s = list(state.told_s)
    step(progress, TOTAL)
    await progress.close()
    assert len(told_s) >= 10
    # The clock of the sender is read before Redis is told.
    assert all(later - first > 0.95 for first, later in zip(told_s, told_s[EVENTS_A_SECOND:], strict=False))
    kinds = [kind for kind, _, _ in state.told]
    assert min(kinds.count("step"), kinds.count("preview")) >= 4
    assert ("step", TOTAL, b"") in state.told[-2:]


async def test_a_redis_that_is_away_costs_one_try() -> None:
    state = SlowState()
    state.down = True
    state.open.set()
    progress = progress_to(state)
    step(progress, 1)
    progress.preview(types_pb2.Media(data=b"old"))
    await progress.close()
    assert state.told == []
    state.down = False
    step(progress, TOTAL)
    await progress.close()
    assert state.told == [("step", TOTAL, b"")]
