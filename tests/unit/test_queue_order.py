"""Who runs next, on a real Redis: fair shares, priority classes, affinity, bounds and deadlines. Waits count claims."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import pytest

from gateway.config import RedisSection
from gateway.records import Claim, queue_key, request_key
from gateway.state import State
from gateway.ticket import Offer, Ticket
from protos import types_pb2
from services.errors import Overloaded

QUEUE = queue_key("dit", "d")
WEIGHTS = {"flood": 1.0, "small": 1.0, "heavy": 2.0}
CLASSES = (-1, 0, 1)


class Queue:
    """One queue, seen through a State."""

    def __init__(self, url: str) -> None:
        self.state = State(RedisSection(url=url), "gateway")
        self.expired: list[str] = []
        self.state._on_expired = self.expired.append

    async def submit(self, request_id: str, **terms: object) -> None:
        weight = WEIGHTS.get(str(terms.get("tenant")), 1.0)
        await self.state.submit(request_id, QUEUE, Ticket(weight=weight, **terms), {"params": b""})

    async def claim(self, *running: str) -> Claim | None:
        return await self.state.claim([QUEUE], 60.0, {QUEUE: Offer(batches=running)})

    async def order(self, *running: str) -> list[str]:
        """All that is left, in the order of claiming."""
        ids = []
        while claim := await self.claim(*running):
            ids.append(claim.request_id)
        return ids


@pytest.fixture
async def queue(url: str) -> AsyncIterator[Queue]:
    queue = Queue(url)
    await queue.state._scripts.redis.flushall()
    yield queue
    await queue.state.close()


async def test_shares_follow_the_weights_while_one_tenant_floods(queue: Queue) -> None:
    draw = random.Random(11)
    tenants = ["flood"] * 550 + ["small"] * 150 + ["heavy"] * 300
    draw.shuffle(tenants)
    waiting: Counter[tuple[int, str]] = Counter()
    for number, tenant in enumerate(tenants):
        priority, cost = draw.choice(CLASSES), draw.choice((1.0, 2.0, 5.0))
        waiting[priority, tenant] += 1
        await queue.submit(f"r{number}", tenant=tenant, priority=priority, cost=cost)
    served: dict[int, Counter[str]] = {priority: Counter() for priority in CLASSES}
    order = []
    while claim := await queue.claim():
        record = claim.record
        priority, tenant, cost = int(record["priority"]), record["tenant"].decode(), float(record["cost"])
        order.append(priority)
        if all(waiting[priority, each] for each in WEIGHTS):
            served[priority][tenant] += cost
        waiting[priority, tenant] -= 1
    assert len(order) == 1000 and order == sorted(order)
    for shares in served.values():
        total = sum(shares.values())
        assert total > 300
        for tenant, weight in WEIGHTS.items():
            assert shares[tenant] / total == pytest.approx(weight / 4, rel=0.15), shares


async def small_waits(queue: Queue, others: Sequence[tuple[str, int]]) -> list[int]:
    """Claims that each request of the small tenant waits for, its own included; it sends one every eight claims.

    Each is in the class that is being served: there it competes with the others.
    """
    await queue.state._scripts.redis.flushall()
    draw = random.Random(7)
    for number, (tenant, priority) in enumerate(others):
        await queue.submit(f"{tenant}{number}", tenant=tenant, priority=priority, cost=draw.choice((1.0, 2.0, 5.0)))
    waits, sent, priority, claims = [], {}, -1, 0
    for number in range(100):
        await queue.submit(f"small{number}", tenant="small", priority=priority, cost=draw.choice((1.0, 2.0, 5.0)))
        sent[f"small{number}"] = claims
        for _ in range(8):
            if claim := await queue.claim():
                claims += 1
                priority = int(claim.record["priority"])
                if claim.request_id in sent:
                    waits.append(claims - sent.pop(claim.request_id))
    assert len(waits) == 100
    return sorted(waits)


async def test_a_small_tenant_waits_no_longer_than_twice_what_it_waits_alone(queue: Queue) -> None:
    draw = random.Random(3)
    alone = await small_waits(queue, [])
    others = [(draw.choice(("flood", "flood", "heavy")), draw.choice(CLASSES)) for _ in range(900)]
    flood = await small_waits(queue, others)
    assert flood[94] <= 2 * alone[94], Counter(flood)


async def test_a_tenant_owes_nothing_for_what_it_aborts(queue: Queue) -> None:
    for number in range(10):
        await queue.submit(f"a{number}", tenant="a")
        await queue.submit(f"b{number}", tenant="b")
    for number in range(9):
        assert await queue.state.abort(f"a{number}") == "cancelled"
    await queue.submit("a10", tenant="a")
    assert (await queue.order())[:4] == ["a9", "b0", "a10", "b1"]


async def test_affinity_passes_nobody_over_more_than_eight_times(queue: Queue) -> None:
    for number in range(12):
        await queue.submit(f"x{number}", batch="x")
    for number in range(20):
        await queue.submit(f"y{number:02d}", batch="y")
    order = await queue.order("y")
    assert order[:9] == [*(f"y{number:02d}" for number in range(8)), "x0"]
    # They have been passed over alike: all of them go before the next one that suits better.
    assert order[9:20] == [f"x{number}" for number in range(1, 12)]


async def test_affinity_looks_at_the_first_32_of_the_class(queue: Queue) -> None:
    await queue.submit("other class", priority=1, batch="y")
    for number in range(32):
        await queue.submit(f"x{number}", batch="x")
    await queue.submit("y", batch="y")
    order = await queue.order("y")
    assert order[:2] == ["x0", "y"] and order[-1] == "other class"


async def test_affinity_is_charged_to_its_tenant(queue: Queue) -> None:
    for number in range(8):
        await queue.submit(f"a{number}", tenant="a", batch="x")
        await queue.submit(f"b{number}", tenant="b", batch="y")
    assert [(await queue.claim("y")).request_id for _ in range(3)] == ["b0", "b1", "b2"]
    assert [request_id[0] for request_id in (await queue.order())[:6]] == ["a", "a", "a", "a", "b", "a"]


async def test_the_queue_is_bounded_as_a_whole_and_for_each_tenant(queue: Queue) -> None:
    bounds = {"max_queued": 6, "max_queued_tenant": 4}
    for number in range(4):
        await queue.submit(f"a{number}", tenant="a", priority=number % 3 - 1, **bounds)
    with pytest.raises(Overloaded, match="4 of your requests wait") as refused:
        await queue.submit("a4", tenant="a", **bounds)
    assert refused.value.retry_after_s == 1.0
    for number in range(2):
        await queue.submit(f"b{number}", tenant="b", **bounds)
    with pytest.raises(Overloaded, match="6 requests wait"):
        await queue.submit("b2", tenant="b", **bounds)
    assert await queue.claim()
    await queue.submit("b2", tenant="b", **bounds)


async def test_a_refusal_says_how_long_the_queue_takes(queue: Queue) -> None:
    for number in range(24):
        await queue.submit(f"r{number}")
    for _ in range(4):
        assert await queue.claim()
        await asyncio.sleep(0.1)
    with pytest.raises(Overloaded) as refused:
        await queue.submit("one more", max_queued=20)
    # 20 wait, and there was a claim every 0.1 s at best.
    assert 2.0 <= refused.value.retry_after_s <= 60.0


@pytest.mark.parametrize("by_claim", [True, False])
async def test_a_request_whose_deadline_passes_in_the_queue_expires(queue: Queue, by_claim: bool) -> None:
    await queue.submit("late", timeout_s=0.05)
    await queue.submit("in time")
    await asyncio.sleep(0.1)
    if by_claim:
        assert await queue.order() == ["in time"]
    else:
        await queue.state.sweep()
    assert queue.expired == ["late"]
    events = [event async for event in queue.state.events("late", "0")]
    assert [event.state for event in events] == ["queued", "expired"]
    error = types_pb2.ErrorDetail.FromString(events[-1].record["error"])
    assert error.reason == "deadline_exceeded"
    assert await queue.state.abort("late") == "expired"


async def test_what_has_waited_long_moves_up(queue: Queue) -> None:
    await queue.submit("old", priority=1, age_s=0.1)
    await queue.submit("low", priority=1)
    await queue.submit("normal")
    await queue.submit("high", priority=-1)
    for _ in range(2):
        await asyncio.sleep(0.15)
        await queue.state.sweep()
    await queue.submit("higher", priority=-1)
    assert await queue.order() == ["old", "high", "higher", "normal", "low"]
    assert not await queue.state._scripts.redis.keys("{ll}:[qd]*")


async def test_what_has_been_forgotten_does_not_come_back_when_it_is_passed_over(queue: Queue) -> None:
    for request_id, batch in (("gone", "a"), ("like", "b")):
        await queue.submit(request_id, batch=batch)
    key = request_key("gone")
    await queue.state._scripts.redis.delete(key)
    claim = await queue.claim("b")
    assert claim is not None and claim.request_id == "like"
    assert not await queue.state._scripts.redis.exists(key)
