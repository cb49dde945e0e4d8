"""The queue, leases, fences and events on a real Redis, as two gateways see them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from gateway.config import RedisSection
from gateway.followers import READ_EVENTS, StoredEvent
from gateway.records import Claim, queue_key
from gateway.scripts import AT_ONCE
from gateway.state import TOO_LATE, State
from gateway.ticket import Offer, Start, Ticket
from services.errors import Overloaded, StateStoreDown, UnknownRequest

DIT, VAE = queue_key("dit", "d"), queue_key("vae", "v")
LEASE_S = 10.0
FIELDS = {"params": b"p", "step": 0}


class Gateway:
    """A State, and what its dispatcher was told."""

    def __init__(self, url: str) -> None:
        self.state = State(RedisSection(url=url), "gateway")
        self.queued = 0
        self.cancelled: list[str] = []
        self.expired: list[str] = []
        listening = self.state.listen(self._on_queue, self.cancelled.append, self.expired.append)
        self.listening = asyncio.create_task(listening)

    def _on_queue(self) -> None:
        self.queued += 1

    async def submit(self, request_id: str, **terms: object) -> bool:
        stored, claim = await self.state.submit(request_id, DIT, Ticket(**terms), FIELDS)
        assert claim is None
        return stored

    async def claim(self, *queues: str, lease_s: float = LEASE_S) -> Claim:
        claim = await self.state.claim(queues or (DIT,), lease_s)
        assert claim is not None
        return claim


@pytest.fixture
async def two(url: str) -> AsyncIterator[tuple[Gateway, Gateway]]:
    gateways = Gateway(url), Gateway(url)
    await until(lambda: all(gateway.state.connected for gateway in gateways))
    await gateways[0].state._scripts.redis.flushall()
    yield gateways
    for gateway in gateways:
        gateway.listening.cancel()
        await gateway.state.close()


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def follow(gateway: Gateway, request_id: str, after: str = "0") -> list[StoredEvent]:
    return [event async for event in gateway.state.events(request_id, after)]


def kinds(events: list[StoredEvent]) -> list[str]:
    return [event.state or event.payload.decode() for event in events]


async def test_a_whole_life_is_seen_alike_by_its_own_gateway_and_by_another(two) -> None:
    own, other = two
    assert await own.submit("r") == 1
    followers = [asyncio.create_task(follow(gateway, "r")) for gateway in (own, own, other)]
    claim = await own.claim()
    assert (claim.request_id, claim.queue, claim.left) == ("r", DIT, 0)
    for step in range(1, 4):
        assert await own.state.beat(claim, LEASE_S, kind="step", payload=b"%d" % step, step=step, total=3) == "running"
    assert await own.state.commit(claim, "running", "vae", "", {"busy:dit": 1.5}) == "running"
    assert await own.state.commit(claim, "done", "vae", "", {"artifact": b"a"}) == "done"
    seen = [await follower for follower in followers]
    assert kinds(seen[0]) == ["queued", "running", "1", "2", "3", "running", "done"]
    for events in seen:
        # Records are as new as each follower's reading of them.
        assert [(event.event_id, event.state, event.payload) for event in events] == [
            (event.event_id, event.state, event.payload) for event in seen[0]
        ]
        assert events[-1].record["busy:dit"] == b"1.5" and events[-1].record["artifact"] == b"a"
        assert float(events[-1].record["queued_s"]) >= 0
    assert kinds(await follow(other, "r", after=seen[0][4].event_id)) == ["running", "done"]


async def test_own_changes_reach_own_followers_at_once(two) -> None:
    own, other = two
    other.listening.cancel()
    own.listening.cancel()
    await own.submit("r")
    claim = await own.claim()
    follower = asyncio.create_task(follow(own, "r"))
    await asyncio.sleep(0.05)
    started_s = time.monotonic()
    await own.state.commit(claim, "done", "", "", {})
    assert kinds(await follower)[-1] == "done" and time.monotonic() - started_s < 1.0


async def test_more_events_than_one_reading_holds(two) -> None:
    own, other = two
    await own.submit("r")
    claim = await own.claim()
    for number in range(READ_EVENTS + 50):
        await own.state.beat(claim, LEASE_S, kind="step", payload=b"%d" % number, step=1, total=2)
    await own.state.commit(claim, "done", "", "", {})
    started_s = time.monotonic()
    assert len(await follow(other, "r")) == READ_EVENTS + 53
    assert time.monotonic() - started_s < 1.0


async def test_frames_are_no_events_and_never_become_fewer(two) -> None:
    own, other = two
    await own.submit("r")
    claim = await own.claim()
    assert await own.state.commit(claim, "queued", "vae", VAE, {}) == "queued"
    claim = await own.claim(VAE)
    for made in (5, 9):
        assert await own.state.beat(claim, LEASE_S, kind="frames", step=made) == "running"
    assert await own.state.requeue("r", claim.fence, 3, True, b"lost") == "queued"
    assert await own.state.beat(claim, LEASE_S, kind="frames", step=33) == "lost"
    claim = await own.claim(VAE)
    for made, most in ((5, b"9"), (9, b"9"), (13, b"13")):
        assert await own.state.beat(claim, LEASE_S, kind="frames", step=made) == "running"
        assert (await other.state.get("r"))["frames"] == most
    await own.state.commit(claim, "done", "", "", {})
    assert not [event for event in await follow(other, "r") if event.kind == "frames"]


async def test_queues_are_asked_in_order_and_hold_priorities(two) -> None:
    own, other = two
    for request_id, priority in (("late", 1), ("first", 0), ("second", 0)):
        await own.submit(request_id, priority=priority)
    first = await own.claim(VAE, DIT)
    assert (first.request_id, first.left) == ("first", 2)
    assert await own.state.commit(first, "queued", "vae", VAE, {}) == "queued"
    again = await other.claim(VAE, DIT)
    assert (again.request_id, again.queue, again.left) == ("first", VAE, 2)
    assert again.fence > first.fence
    assert [(await other.claim(VAE, DIT)).request_id for _ in range(2)] == ["second", "late"]
    assert await other.state.claim((VAE, DIT), LEASE_S) is None
    await until(lambda: other.queued >= 4)


async def test_a_submit_claims_when_nobody_waits_before(two) -> None:
    own, other = two
    stored, claim = await own.state.submit("first", DIT, Ticket(), FIELDS, start=Start(LEASE_S))
    assert stored and claim is not None and (claim.request_id, claim.record["state"]) == ("first", b"running")
    assert await own.state.submit("first", DIT, Ticket(), FIELDS, start=Start(LEASE_S)) == (False, None)
    await own.submit("second")
    assert await own.state.submit("third", DIT, Ticket(), FIELDS, start=Start(LEASE_S)) == (True, None)
    assert [(await other.claim()).request_id for _ in range(2)] == ["second", "third"]
    follower = asyncio.create_task(follow(other, "first"))
    assert await own.state.commit(claim, "done", "", "", {}) == "done"
    assert kinds(await follower) == ["queued", "running", "done"]


async def test_a_submit_whose_answer_was_lost_brings_its_claim_when_tried_again(two, monkeypatch) -> None:
    own, _ = two
    script, tries = own.state._scripts.by_name["submit"], []

    async def losing(**arguments):
        answer = await script(**arguments)
        tries.append(answer)
        if len(tries) == 1:
            raise ConnectionError("the answer is lost")
        return answer

    monkeypatch.setitem(own.state._scripts.by_name, "submit", losing)
    stored, claim = await own.state.submit("r", DIT, Ticket(), FIELDS, start=Start(LEASE_S))
    assert (stored, len(tries)) == (False, 2)
    assert claim is not None and await own.state.commit(claim, "done", "", "", {}) == "done"


async def test_a_submit_that_redis_finds_after_its_caller_has_left_stores_nothing(two, monkeypatch) -> None:
    own, _ = two
    await own.submit("first")
    script, late = own.state._scripts.by_name["submit"], []

    async def held_back(**arguments):
        late.append(arguments)
        await asyncio.sleep(60)

    monkeypatch.setitem(own.state._scripts.by_name, "submit", held_back)
    with pytest.raises(StateStoreDown):
        await own.submit("second")
    _, stored = await script(**late[0])
    assert stored == TOO_LATE and not await own.state.get("second")


async def test_a_redis_with_another_clock_takes_requests(two) -> None:
    own, _ = two
    own.state._clock_ahead_s = -1e6
    assert await own.submit("r") == 1 and own.state._clock_ahead_s > 0


async def test_an_old_fence_changes_nothing(two) -> None:
    own, other = two
    await own.submit("r")
    old = await own.claim(lease_s=0.0)
    assert await other.state.requeue("r", None, 3, True, b"e") == "queued"
    new = await other.claim()
    assert await own.state.beat(old, LEASE_S) == "lost"
    assert await own.state.commit(old, "done", "", "", {"artifact": b"old"}) == "lost"
    assert await own.state.requeue("r", old.fence, 3, True, b"e") == "lost"
    assert await other.state.commit(new, "done", "", "", {"artifact": b"new"}) == "done"
    assert (await own.state.get("r"))["artifact"] == b"new"


async def test_attempts_are_counted_and_end(two) -> None:
    own, _ = two
    await own.submit("r")
    for outcome in ("queued", "queued", "failed"):
        claim = await own.claim()
        assert await own.state.requeue("r", claim.fence, 3, True, b"broken") == outcome
    assert (await own.state.get("r"))["error"] == b"broken"


async def test_the_last_attempt_is_made_alone(two) -> None:
    own, other = two
    offers = {DIT: Offer("replica", 8)}
    await own.submit("suspect")
    for _ in range(2):
        claim = await own.state.claim((DIT,), LEASE_S, offers)
        assert "alone" not in claim.record
        assert await own.state.requeue("suspect", claim.fence, 3, True, b"broken") == "queued"
    claim = await own.state.claim((DIT,), LEASE_S, offers)
    assert claim.record["alone"] == b"1"
    await own.submit("next")
    assert await other.state.claim((DIT,), LEASE_S, offers) is None and offers[DIT].full
    # At its next stage it shares again, so what is lost there may be another's doing once more.
    assert await own.state.commit(claim, "running", "vae", "", {}) == "running"
    assert (await other.state.claim((DIT,), LEASE_S, offers)).request_id == "next"
    assert await own.state.requeue("suspect", claim.fence, 3, True, b"broken") == "queued"
    again = await own.state.claim((DIT,), LEASE_S, offers)
    assert (again.request_id, again.record["alone"]) == ("suspect", b"1")
    assert await own.state.requeue("suspect", again.fence, 3, True, b"broken") == "failed"


async def test_an_abort_reaches_the_owner_and_wins_over_a_result(two) -> None:
    own, other = two
    await own.submit("r")
    claim = await own.claim()
    assert await other.state.abort("r") == "cancelling"
    await until(lambda: own.cancelled == ["r"])
    assert await own.state.commit(claim, "done", "", "", {"artifact": b"a"}) == "cancelled"
    assert "artifact" not in await own.state.get("r")
    await own.submit("waits")
    assert await own.state.abort("waits") == "cancelled"
    assert await own.state.claim((DIT,), LEASE_S) is None
    assert await own.state.abort("nobody") is None


async def test_an_abort_meets_only_the_tenants_own_requests(two) -> None:
    own, _ = two
    await own.submit("r", tenant="anna")
    assert await own.state.abort("r", "bert") is None
    events, ended = await own.state._read_events("r", "0")
    assert kinds(events) == ["queued"] and not ended
    assert await own.state.abort("r", "anna") == "cancelled"


async def test_who_comes_back_after_the_last_event_is_let_go(two) -> None:
    own, other = two
    await own.submit("r")
    await own.state.abort("r")
    async with asyncio.timeout(1.0):
        seen = [event async for event in own.state.events("r", "0")]
        assert kinds(seen) == ["queued", "cancelled"]
        assert [event async for event in other.state.events("r", seen[-1].event_id)] == []


async def test_an_abort_overtakes_a_crowd(two) -> None:
    own, _ = two
    await own.submit("r")
    crowd = [asyncio.create_task(own.state.get("r")) for _ in range(1000)]
    await asyncio.sleep(0)
    assert await own.state.abort("r") == "cancelled"
    assert sum(task.done() for task in crowd) < len(crowd) / 2
    await asyncio.gather(*crowd)


async def test_a_queue_is_bounded_by_work_and_bytes(two) -> None:
    own, _ = two
    for bound in ({"max_queued_cost": 10.0}, {"max_queued_bytes": 10}):
        name = next(iter(bound))
        # An empty queue takes any request.
        assert await own.submit(f"{name}-1", cost=11.0, nbytes=11, **bound)
        with pytest.raises(Overloaded, match="work that waits already"):
            await own.submit(f"{name}-2", cost=1.0, nbytes=1, **bound)
        await own.state.abort(f"{name}-1")
        assert await own.submit(f"{name}-3", cost=6.0, nbytes=6, **bound)
        assert await own.submit(f"{name}-4", cost=4.0, nbytes=4, **bound)
        for number in (3, 4):
            await own.state.abort(f"{name}-{number}")


async def test_a_replica_takes_no_more_work_than_it_says(two) -> None:
    own, other = two
    for name, cost in (("large", 12.0), ("small", 4.0), ("next", 5.0), ("last", 1.0)):
        await own.submit(name, cost=cost)
    offers = {DIT: Offer("replica", 8, 10.0)}
    large = await own.state.claim((DIT,), LEASE_S, offers)
    assert large.request_id == "large"
    assert await other.state.claim((DIT,), LEASE_S, offers) is None and offers[DIT].full
    await own.state.commit(large, "done", "", "", {})
    assert [(await own.state.claim((DIT,), LEASE_S, offers)).request_id for _ in range(3)] == ["small", "next", "last"]


async def test_a_crowd_shares_few_connections(two) -> None:
    own, _ = two
    before = len(await own.state._scripts.redis.client_list())
    await asyncio.gather(*(own.submit(f"r{number}") for number in range(300)))
    assert len(await own.state._scripts.redis.client_list()) < before + AT_ONCE
    assert len(await own.state.following("", 1000, None, oldest_first=False)) == 300


async def test_ids_are_stored_once_and_queues_are_bounded(two) -> None:
    own, _ = two
    assert [await own.submit("r", max_queued=1), await own.submit("r")] == [True, False]
    with pytest.raises(Overloaded, match="1 requests wait"):
        await own.submit("s", max_queued=1)
    with pytest.raises(UnknownRequest):
        await follow(own, "s")


async def test_a_lease_runs_out_unless_it_is_renewed(two) -> None:
    own, _ = two
    for request_id in ("kept", "lost"):
        await own.submit(request_id)
    kept, _lost = await own.state.claim((DIT,), 0.2), await own.state.claim((DIT,), 0.2)
    assert kept is not None and await own.state.beat(kept, LEASE_S) == "running"
    await asyncio.sleep(0.25)
    assert await own.state.expired() == ["lost"]


async def test_two_reapers_take_a_request_away_once(two) -> None:
    own, other = two
    await own.submit("r")
    await own.claim(lease_s=0.0)
    assert await own.state.expired() == await other.state.expired() == ["r"]
    assert await own.state.requeue("r", None, 3, True, b"e") == "queued"
    assert await other.state.requeue("r", None, 3, True, b"e") == "lost"
    claim = await own.claim()
    assert await other.state.requeue("r", None, 3, True, b"e") == "lost"
    assert await own.state.commit(claim, "done", "", "", {}) == "done"


async def test_a_lease_renewed_after_the_reaper_saw_it_expired_is_kept(two) -> None:
    own, other = two
    await own.submit("r")
    claim = await own.claim(lease_s=0.0)
    assert await other.state.expired() == ["r"]
    assert await own.state.beat(claim, LEASE_S) == "running"
    assert await other.state.requeue("r", None, 3, True, b"e") == "lost"
    assert await own.state.beat(claim, LEASE_S) == "running"


async def end_done(own: Gateway) -> None:
    assert await own.state.commit(await own.claim(), "done", "", "", {}) == "done"


async def end_failed(own: Gateway) -> None:
    for outcome in ("queued", "failed"):
        assert await own.state.requeue("r", (await own.claim()).fence, 1, True, b"e") == outcome


async def end_aborted(own: Gateway) -> None:
    assert await own.state.abort("r") == "cancelled"


async def end_aborted_at_work(own: Gateway) -> None:
    claim = await own.claim()
    assert await own.state.abort("r") == "cancelling"
    assert await own.state.requeue("r", claim.fence, 3, False, b"e") == "cancelled"


async def end_expired(own: Gateway) -> None:
    await asyncio.sleep(0.2)
    await own.state.sweep()
    assert (await own.state.get("r"))["state"] == b"expired"


@pytest.mark.parametrize("end", [end_done, end_failed, end_aborted, end_aborted_at_work, end_expired])
async def test_pictures_are_apart_from_the_record_and_go_at_the_end(two, end) -> None:
    own, other = two
    picture = bytes(1_000_000)
    terms = Ticket(timeout_s=0.1 if end is end_expired else 60.0)
    assert (await own.state.submit("r", DIT, terms, FIELDS, inputs=picture))[0]
    assert await other.state.inputs("r") == picture
    assert await own.state._scripts.redis.memory_usage("{ll}:req:r") < 2000
    await end(own)
    assert await other.state.inputs("r") is None
    redis = own.state._scripts.redis
    # Of all that is left, the events take most: a stream begins with 4 KiB.
    assert sum([await redis.memory_usage(key) for key in await redis.keys("*:r")]) < 10_000


async def test_pictures_wait_for_another_attempt_and_for_the_next_stage(two) -> None:
    own, other = two
    await own.state.submit("r", DIT, Ticket(), FIELDS, inputs=b"picture")
    claim = await own.claim()
    assert await own.state.requeue("r", claim.fence, 3, True, b"e") == "queued"
    assert await other.state.commit(await other.claim(), "queued", "vae", VAE, {}) == "queued"
    assert await own.state.inputs("r") == b"picture"


async def test_previews_are_forgotten_soon_after_the_end(two) -> None:
    own, other = two
    await own.submit("r")
    claim = await own.claim()
    for number in range(3):
        await own.state.beat(claim, LEASE_S, kind="preview", payload=b"%d" % number)
    redis = own.state._scripts.redis
    assert await redis.ttl("{ll}:pv:r") == pytest.approx(await redis.ttl("{ll}:req:r"), abs=2)
    await own.state.commit(claim, "done", "", "", {})
    assert 0 < await redis.ttl("{ll}:pv:r") <= 60
    assert kinds(await follow(other, "r")) == ["queued", "running", "0", "1", "2", "done"]
    await redis.delete("{ll}:pv:r")
    assert kinds(await follow(other, "r")) == ["queued", "running", "done"]


async def test_so_many_previews_are_kept_the_newest(two) -> None:
    own, other = two
    await own.submit("r")
    claim = await own.claim()
    for number in range(20):
        await own.state.beat(claim, LEASE_S, kind="preview", payload=b"%d" % number)
    assert await own.state._scripts.redis.hlen("{ll}:pv:r") == 16
    await own.state.commit(claim, "done", "", "", {})
    assert kinds(await follow(other, "r")) == ["queued", "running", *map(str, range(4, 20)), "done"]


@pytest.mark.parametrize("end", ["done", "failed", "cancelled", "expired"])
async def test_events_are_forgotten_an_hour_after_the_end_and_the_record_tells_of_it(two, end: str) -> None:
    own, other = two
    await own.submit("r", timeout_s=0.0 if end == "expired" else 60.0)
    redis = own.state._scripts.redis
    if end == "cancelled":
        await own.state.abort("r")
    elif end == "expired":
        await own.state.sweep()
    elif end == "failed":
        await own.state.requeue("r", (await own.claim()).fence, 1, True, b"e")
        await own.state.requeue("r", (await own.claim()).fence, 1, True, b"e")
    else:
        await own.state.commit(await own.claim(), end, "", "", {})
    assert 3500 < await redis.ttl("{ll}:ev:r") <= 3600 < await redis.ttl("{ll}:req:r")
    before = await follow(other, "r")
    await redis.delete("{ll}:ev:r")
    assert await follow(other, "r") == before[-1:]
    assert await follow(other, "r", before[0].event_id) == before[-1:]
    assert await follow(other, "r", before[-1].event_id) == []


async def refuses(gateway: Gateway) -> None:
    """Nothing is written, for as long as each of the two tries."""
    answer, writable = await asyncio.gather(gateway.submit("r"), gateway.state.writable(), return_exceptions=True)
    assert isinstance(answer, StateStoreDown) and "refuses" in answer.message
    assert writable is False


async def test_a_redis_that_refuses_to_write_is_down(two) -> None:
    own, _ = two
    administrator = own.state._scripts.redis
    await administrator.config_set("maxmemory", 1)
    await refuses(own)
    await administrator.config_set("maxmemory", 0)
    assert await own.state.writable()
    await administrator.replicaof("127.0.0.1", 1)
    await refuses(own)
    refused = asyncio.create_task(own.submit("r"))
    await asyncio.sleep(0.3)
    await administrator.replicaof("NO", "ONE")
    assert await refused == 1
