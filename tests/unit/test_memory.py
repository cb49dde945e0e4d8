"""How much of the gateway's memory its requests are reckoned to hold, on a real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from gateway.config import RedisSection
from gateway.memory import Memory
from gateway.state import State
from protos.types_pb2 import GenerationParams

MIB = 1024 * 1024


def params(model: str = "m", side_px: int = 1024, frames: int = 0) -> GenerationParams:
    return GenerationParams(model=model, width=side_px, height=side_px, num_frames=frames)


@pytest.fixture
async def gateway(url: str) -> AsyncIterator[Callable[[int], Memory]]:
    """A gateway's memory, of so many bytes; each time another gateway's."""
    states: list[State] = []

    def make(max_bytes: int) -> Memory:
        states.append(State(RedisSection(url=url), "gateway"))
        return Memory(max_bytes, states[-1])

    first = make(0)
    await first._state._scripts.redis.flushall()
    yield make
    for state in states:
        await state.close()


async def test_there_is_room_until_it_is_full_and_one_may_exceed_it(gateway) -> None:
    memory = gateway(6 * MIB)
    with memory.held_by(params(), 0), memory.held_by(params(), 0):
        assert memory.has_room
        with memory.held_by(params(), 0):
            assert not memory.has_room
        assert memory.has_room
    with memory.held_by(params(frames=81), 0):
        assert not memory.has_room
    assert memory.has_room


async def test_sizes_are_learnt_for_each_model(gateway) -> None:
    memory = gateway(32 * MIB)
    memory.learn(params(), 20 * MIB)
    with memory.held_by(params(model="other"), 0):
        assert memory.has_room
    with (
        memory.held_by(params(side_px=512), 0),
        memory.held_by(params(side_px=512), 0),
        memory.held_by(params(side_px=512), 0),
    ):
        assert memory.has_room
        with memory.held_by(params(side_px=512), 0):
            assert not memory.has_room


async def test_clips_are_told_apart_from_pictures(gateway) -> None:
    memory = gateway(32 * MIB)
    memory.learn(params(frames=81), 20 * MIB)
    with memory.held_by(params(), 0):
        assert memory.has_room
        memory.learn(params(), 20 * MIB)
        assert not memory.has_room


async def test_what_one_gateway_has_learnt_another_knows_that_has_carried_nothing_yet(gateway) -> None:
    own, other = gateway(32 * MIB), gateway(32 * MIB)
    first = params()
    with other.held_by(first, 0):
        await other.ask(first)
        assert other.has_room
        own.learn(params(), 20 * MIB)
        await own.tell(params())
        await other.ask(first)
        assert not other.has_room
        # It goes by its own latents once it has seen some.
        other.learn(first, 1 * MIB)
        assert other.has_room


async def test_it_reckons_on_while_redis_is_away() -> None:
    memory = Memory(32 * MIB, State(RedisSection(url="redis://127.0.0.1:1/0"), "gateway"))
    with memory.held_by(params(), 0):
        await memory.ask(params())
        assert memory.has_room
        memory.learn(params(), 20 * MIB)
        await memory.tell(params())
        assert not memory.has_room
