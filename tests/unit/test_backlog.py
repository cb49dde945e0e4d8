"""What waits, as an autoscaler reads it: on a real Redis, with replicas that are only said to be there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.backlog import Backlog
from gateway.config import RedisSection, StagesSection
from gateway.pace import Pace
from gateway.records import queue_key
from gateway.replica import Place, Replica
from gateway.replicas import Replicas
from gateway.state import State
from gateway.ticket import Ticket, feed_key
from protos import types_pb2

PIXELS, STEPS = 64 * 64, 10
PARAMS = types_pb2.GenerationParams(width=64, height=64, steps=STEPS)


@pytest.fixture
async def state(url: str) -> AsyncIterator[State]:
    state = State(RedisSection(url=url), "gateway")
    await state._scripts.redis.flushall()
    yield state
    await state.close()


def cluster(**running: int) -> Replicas:
    """A replica of each stage of model m, with so many requests."""
    replicas = Replicas(StagesSection(), lambda: None)
    for stage in ("text_encoder", "dit", "vae"):
        facts = types_pb2.DescribeResponse(models=["m"], component_id=stage[0], in_flight=running.get(stage, 0))
        replicas.known[stage, "a"] = Replica(stage, "a", cast(Any, None), facts)
        replicas._last[Place(stage, "m")] = facts
    return replicas


def usage(seconds: float) -> types_pb2.StageUsage:
    return types_pb2.StageUsage(spans=[types_pb2.Span(duration_ns=int(seconds * 1e9))])


async def queue(state: State, stage: str, count: int) -> None:
    for index in range(count):
        fields: dict[str, Any] = {"pixels": PIXELS, "total": STEPS}
        key = queue_key(stage, stage[0])
        await state.submit(f"{stage}{index}", key, Ticket(), fields)


async def figures(backlog: Backlog) -> dict[tuple[str, str], float]:
    """By name without its prefix, and stage."""
    text = (await backlog.exposition()).decode()
    return {
        (sample.name.removeprefix("lightloom_"), sample.labels["stage"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_seconds_are_what_replicas_took_for_the_work_that_waits(state: State) -> None:
    replicas = cluster(dit=4)
    await queue(state, "dit", 6)
    await queue(state, "vae", 2)
    before = await figures(Backlog(state, replicas))
    assert before["queued_requests", "dit"] == before["queued_requests", "text_encoder"] == 6
    assert ("queued_seconds", "dit") not in before, "nobody has worked yet, and that must not look like an empty queue"
    # Four at a time in 8 seconds are 2 seconds each.
    replicas.known["dit", "a"].took(usage(8.0), PARAMS)
    replicas.known["text_encoder", "a"].took(usage(0.5), PARAMS)
    # Twice as large: the two that wait take half of it each.
    replicas.known["vae", "a"].took(usage(3.0), types_pb2.GenerationParams(width=128, height=64, steps=1))
    now = await figures(Backlog(state, replicas))
    assert now["queued_seconds", "dit"] == pytest.approx(12.0)
    assert now["queued_seconds", "text_encoder"] == pytest.approx(3.0)
    assert now["queued_seconds", "vae"] == pytest.approx(3.0)
    assert (now["running_requests", "dit"], now["replicas", "dit"]) == (4, 1)


async def test_what_waits_for_an_interpolator_are_clips_that_wait_to_be_decoded(state: State) -> None:
    replicas = cluster()
    facts = types_pb2.DescribeResponse(component_id="i", in_flight=2)
    replicas.known["interpolation", "a"] = Replica("interpolation", "a", cast(Any, None), facts)
    replicas._last[Place("interpolation", "")] = facts
    replicas.known["interpolation", "a"].took(usage(4.0), PARAMS)
    empty = await figures(Backlog(state, replicas))
    assert empty["queued_requests", "interpolation"] == empty["queued_seconds", "interpolation"] == 0
    await queue(state, "vae", 2)
    for index, stage in enumerate(("vae", "vae", "vae", "dit")):
        ticket = Ticket(feed=feed_key("m", with_inputs=False, interpolated=True))
        await state.submit(f"smooth{index}", queue_key(stage, stage[0]), ticket, {"pixels": PIXELS, "total": STEPS})
    now = await figures(Backlog(state, replicas))
    assert now["queued_requests", "vae"] == 5
    # Two at a time in 4 seconds are 2 seconds each.
    assert now["queued_requests", "interpolation"] == 3
    assert now["queued_seconds", "interpolation"] == pytest.approx(6.0)
    assert now["running_requests", "interpolation"] == 2


async def test_each_expert_has_figures_of_its_own(state: State) -> None:
    replicas = Replicas(StagesSection(), lambda: None)
    for expert, running in (("high_noise", 3), ("low_noise", 5)):
        facts = types_pb2.DescribeResponse(models=["m"], component_id=expert, expert=expert, in_flight=running)
        replicas.known["dit", expert] = Replica("dit", expert, cast(Any, None), facts)
        replicas._last[Place("dit", "m", expert)] = facts
    await state.submit("waits", queue_key("dit", "low_noise"), Ticket(), {"pixels": PIXELS, "total": STEPS})
    text = (await Backlog(state, replicas).exposition()).decode()
    found = {
        (sample.name, sample.labels["expert"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for expert, running, queued in (("high_noise", 3, 0), ("low_noise", 5, 1)):
        assert found["lightloom_running_requests", expert] == running
        assert found["lightloom_queued_requests", expert] == queued


async def test_a_new_gateway_knows_what_others_learnt_and_replicas_that_left(state: State) -> None:
    replicas = cluster()
    replicas.known["dit", "a"].took(usage(2.0), PARAMS)
    await Backlog(state, replicas).rows()
    await queue(state, "dit", 3)
    other = cluster()
    other.known.clear()
    now = await figures(Backlog(state, other))
    assert now["queued_seconds", "dit"] == pytest.approx(6.0)
    assert now["replicas", "dit"] == 0


async def test_a_long_queue_counts_whole(state: State) -> None:
    replicas = cluster()
    replicas.known["dit", "a"].took(usage(2.0), PARAMS)
    await queue(state, "dit", 450)
    assert (await figures(Backlog(state, replicas)))["queued_seconds", "dit"] == pytest.approx(900.0)


async def test_without_redis_queues_are_unknown_and_not_empty() -> None:
    now = await figures(Backlog(State(RedisSection(url="redis://127.0.0.1:1/0"), "gateway"), cluster(vae=2)))
    assert now["running_requests", "vae"] == 2
    assert not [name for name, _ in now if name.startswith("queued")]


def test_a_pace_follows_what_is_new() -> None:
    pace = Pace()
    pace.learn(1.0, 1, 0.0)
    assert pace.unit_s is None
    pace.learn(10.0, 2, 5.0)
    assert pace.unit_s == pytest.approx(1.0)
    for _ in range(40):
        pace.learn(6.0, 0, 2.0)
    assert pace.unit_s == pytest.approx(3.0, rel=1e-3)
