"""What the dispatcher claims, and for whom, on a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from gateway.config import GatewaySection, RedisSection, StagesSection
from gateway.dispatch import Dispatcher
from gateway.memory import Memory
from gateway.records import Claim, queue_key
from gateway.replica import Place, Replica
from gateway.replicas import Replicas
from gateway.state import State
from gateway.ticket import Ticket, feed_key
from gateway.work import Work
from protos import types_pb2
from services.errors import StateStoreDown

DIT = queue_key("dit", "d")
FIELDS = {"params": b"", "traceparent": ""}
# More than a submit takes with a connection that is open.
LOOP_TURNS = 20


class Runs:
    """A Lifecycle whose requests run until they are aborted or handed back."""

    def __init__(self, state: State) -> None:
        self.memory = Memory(1, state)
        self.aborted: set[str] = set()
        self.state = state
        self.claims: list[Claim] = []
        self._stopping = asyncio.Event()

    def hand_back(self) -> None:
        self._stopping.set()

    async def run(self, claim: Claim, replica: Replica) -> None:
        self.claims.append(claim)
        with self.memory.held_by(Work.of(claim).params, 0):
            try:
                await self._stopping.wait()
            except asyncio.CancelledError:
                await asyncio.shield(self.state.commit(claim, "cancelled", "", "", {}))


class Writes:
    """A store that takes everything."""

    refusal = None


def replica(stage: str, component: str, *models: str) -> Replica:
    found = Replica(stage, f"{stage}-{component}:1", cast(Any, None))
    found.facts = types_pb2.DescribeResponse(
        replica_id=found.address, component_id=component, models=models, max_in_flight=8
    )
    return found


class Gateway:
    """A dispatcher on replicas that are always there."""

    def __init__(self, url: str, *replicas: Replica) -> None:
        self.state = State(RedisSection(url=url), "gateway")
        self.replicas = Replicas(StagesSection(), lambda: None)
        for one in replicas:
            self.replicas.known[one.stage, one.address] = one
            self.replicas._last |= {Place(one.stage, model): one.facts for model in one.facts.models or ("",)}
        self.runs = Runs(self.state)
        parts = cast(Any, self.runs), cast(Any, Writes())
        self.dispatcher = Dispatcher(self.state, self.replicas, *parts, GatewaySection())
        self.state._on_cancel = self.dispatcher.cancel


@pytest.fixture
async def gateway(url: str) -> AsyncIterator[Gateway]:
    made = Gateway(url, replica("text_encoder", "t", "m"), replica("dit", "d", "m"), replica("vae", "v", "m"))
    await made.state._scripts.redis.flushall()
    yield made
    await made.state.close()


async def test_a_model_without_an_encoder_holds_no_other_model_up(url) -> None:
    gateway = Gateway(url, *(replica(stage, stage, "a") for stage in ("text_encoder", "dit", "vae")))
    await gateway.state._scripts.redis.flushall()
    facts = types_pb2.DescribeResponse(component_id="dit", models=["b"])
    gateway.replicas._last |= {Place("dit", "b"): facts, Place("vae", "b"): facts}
    queue = queue_key("dit", "dit")
    for request_id in ("b1", "b2", "a1", "b3", "a2"):
        ticket = Ticket(feed=feed_key(request_id[0], with_inputs=False))
        await gateway.dispatcher.submit(request_id, queue, ticket, FIELDS)
    await gateway.dispatcher._claim_all()
    assert [claim.request_id for claim in gateway.runs.claims] == ["a1", "a2"]
    encoder = replica("text_encoder", "text_b", "b")
    gateway.replicas.known["text_encoder", encoder.address] = encoder
    await gateway.dispatcher._claim_all()
    assert [claim.request_id for claim in gateway.runs.claims] == ["a1", "a2", "b1", "b2", "b3"]
    await gateway.dispatcher.stop()
    await gateway.state.close()


async def test_a_crowd_that_comes_at_once_takes_no_more_memory_than_there_is(gateway) -> None:
    params = types_pb2.GenerationParams(width=64, height=64).SerializeToString()
    ticket = Ticket(feed=feed_key("m", with_inputs=False))
    queue = queue_key("dit", "d")
    submits = [gateway.dispatcher.submit(f"r{n}", queue, ticket, FIELDS | {"params": params}) for n in range(16)]
    await asyncio.gather(*submits[:8], gateway.dispatcher._claim_all(), *submits[8:])
    await gateway.dispatcher._claim_all()
    assert len(gateway.runs.claims) == 1
    await gateway.dispatcher.stop()


@pytest.mark.parametrize("busy", ["text_encoder", "vae"])
async def test_requests_with_pictures_wait_for_both_encoders(url, busy) -> None:
    gateway = Gateway(url, *(replica(stage, stage, "m") for stage in ("text_encoder", "dit", "vae")))
    await gateway.state._scripts.redis.flushall()
    gateway.replicas._last[Place("dit", "m")].limits.max_inputs = 1
    [only] = gateway.replicas.of_stage(busy)
    only.others = 8
    queue = queue_key("dit", "dit")
    await gateway.dispatcher.submit("edit", queue, Ticket(feed=feed_key("m", with_inputs=True)), FIELDS)
    await gateway.dispatcher.submit("plain", queue, Ticket(feed=feed_key("m", with_inputs=False)), FIELDS)
    await gateway.dispatcher._claim_all()
    assert [claim.request_id for claim in gateway.runs.claims] == ([] if busy == "text_encoder" else ["plain"])
    only.others = 0
    await gateway.dispatcher._claim_all()
    assert {claim.request_id for claim in gateway.runs.claims} == {"edit", "plain"}
    await gateway.dispatcher.stop()
    await gateway.state.close()


@pytest.mark.parametrize("withdrawn", [False, True])
async def test_a_claim_whose_answer_never_came_gives_its_slot_back_at_once(gateway, monkeypatch, withdrawn) -> None:
    script, slots = gateway.state._scripts.by_name["submit"], "{ll}:slots:dit-d:1"

    async def unanswered(**arguments):
        await script(**arguments)
        await asyncio.sleep(60)

    monkeypatch.setitem(gateway.state._scripts.by_name, "submit", unanswered)
    with pytest.raises(StateStoreDown):
        await gateway.dispatcher.submit("r", DIT, Ticket(), FIELDS)
    assert await gateway.state._scripts.redis.zcard(slots) == 1
    if withdrawn:
        await gateway.state.withdraw("r")
    # Leases last ten seconds.
    async with asyncio.timeout(2):
        while await gateway.state._scripts.redis.zcard(slots):
            await asyncio.sleep(0.01)
    record = await gateway.state.get("r")
    assert (record["state"], record["attempt"]) == (b"cancelled" if withdrawn else b"queued", b"0")
    await gateway.dispatcher._claim_all()
    assert [claim.request_id for claim in gateway.runs.claims] == ([] if withdrawn else ["r"])
    await gateway.dispatcher.stop()


@pytest.mark.parametrize("known", [False, True])
async def test_clips_to_interpolate_wait_for_an_interpolator_and_others_pass(url, known) -> None:
    stages = [replica(stage, stage, "m") for stage in ("text_encoder", "dit", "vae")]
    interpolator = replica("interpolation", "i")
    gateway = Gateway(url, *stages, *[interpolator] if known else [])
    await gateway.state._scripts.redis.flushall()
    interpolator.others = 8
    for request_id in ("smooth", "plain"):
        feed = feed_key("m", with_inputs=False, interpolated=request_id == "smooth")
        await gateway.dispatcher.submit(request_id, queue_key("vae", "vae"), Ticket(feed=feed), FIELDS)
    await gateway.dispatcher._claim_all()
    assert [claim.request_id for claim in gateway.runs.claims] == ["plain"]
    gateway.replicas.known["interpolation", interpolator.address] = interpolator
    interpolator.others = 0
    await gateway.dispatcher._claim_all()
    assert [claim.request_id for claim in gateway.runs.claims] == ["plain", "smooth"]
    await gateway.dispatcher.stop()
    await gateway.state.close()


async def test_a_submit_that_is_cancelled_leaves_no_claim_without_an_owner(gateway) -> None:
    for turns in range(LOOP_TURNS):
        request_id = f"r{turns}"
        submitting = asyncio.create_task(gateway.dispatcher.submit(request_id, DIT, Ticket(), FIELDS))
        for _ in range(turns):
            await asyncio.sleep(0)
        submitting.cancel()
        await asyncio.wait({submitting}, timeout=5)
        await gateway.state.withdraw(request_id)
    async with asyncio.timeout(5):
        while gateway.dispatcher.running:
            await asyncio.sleep(0.01)
    states = [(await gateway.state.get(f"r{turns}")).get("state") for turns in range(LOOP_TURNS)]
    assert states == [b"cancelled"] * LOOP_TURNS
    assert gateway.runs.claims, "no submit had come to a claim"


async def test_what_a_gateway_left_is_taken_within_a_second_of_its_lease(gateway) -> None:
    """Whatever the lease is: here that of the config, 10 s, which is waited for nowhere."""
    taken = asyncio.Event()

    async def take_away(request_id: str, _error: bytes) -> None:
        assert request_id == "r"
        taken.set()

    cast(Any, gateway.runs).take_away = take_away
    await gateway.state.submit("r", DIT, Ticket(), FIELDS)
    await gateway.state.claim([DIT], 0.001)
    reaping = asyncio.create_task(gateway.dispatcher.reap())
    async with asyncio.timeout(1.3):
        await taken.wait()
    reaping.cancel()
