"""How much of the gateway's memory its requests are reckoned to hold."""

from __future__ import annotations

from gateway.memory import Memory
from gateway.records import Claim
from gateway.work import Work
from protos.types_pb2 import GenerationParams

MIB = 1024 * 1024


def work(model: str = "m", side_px: int = 1024, frames: int = 0) -> Work:
    params = GenerationParams(model=model, width=side_px, height=side_px, num_frames=frames)
    record = {"params": params.SerializeToString(), "deadline": b"1", "updated": b"0", "traceparent": b""}
    return Work.of(Claim("r", 1, record, "q", 0))


def test_there_is_room_until_it_is_full_and_one_may_exceed_it() -> None:
    memory = Memory(6 * MIB)
    with memory.held_by(work()), memory.held_by(work()):
        assert memory.has_room
        with memory.held_by(work()):
            assert not memory.has_room
        assert memory.has_room
    with memory.held_by(work(frames=81)):
        assert not memory.has_room
    assert memory.has_room


def test_sizes_are_learnt_for_each_model() -> None:
    memory = Memory(32 * MIB)
    memory.learn(work(), 20 * MIB)
    with memory.held_by(work(model="other")):
        assert memory.has_room
    with memory.held_by(work(side_px=512)), memory.held_by(work(side_px=512)), memory.held_by(work(side_px=512)):
        assert memory.has_room
        with memory.held_by(work(side_px=512)):
            assert not memory.has_room
