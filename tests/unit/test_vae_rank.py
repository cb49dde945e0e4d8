"""The VAE's rank: what was decoded is encoded beside what comes next."""

from __future__ import annotations

import pytest
import torch

from protos import vae_pb2
from services.channel import Frame, FrameQueue, Kind, OpenCall
from services.config import ModelSection, ServiceSection, StageConfig
from services.rank_process import Call
from services.tensors import bundle_frames
from services.wire import params_to_proto
from tests.unit.test_vae_engine import PARAMS, FakeVae
from vae_svc import rank
from vae_svc.engine import VaeEngine

CONFIG = StageConfig(service=ServiceSection(name="vae", port=0), model=ModelSection(name="m", source="none"))


class Writer:
    """A ClipWriter that notes what happens."""

    def __init__(self, notes: list[str], *_options: object) -> None:
        self._notes = notes
        self._looks = 0

    def is_done(self, _timeout_s: float) -> bool:
        """Not at the first look."""
        self._looks += 1
        return self._looks > 1

    def add(self, frames: object) -> None:
        self._notes.append("decoded")

    def finish(self) -> tuple[str, bytes]:
        self._notes.append("encoded")
        return "image/png", b"picture"

    def close(self) -> None:
        """Nothing runs here."""


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    taken: list[str] = []
    monkeypatch.setattr(rank, "open_engine", lambda *_: VaeEngine(FakeVae().part(), None, 1))
    monkeypatch.setattr(rank, "ClipWriter", lambda *options: Writer(taken, *options))
    return taken


def decode(program: rank.VaeProgram, call_id: int, outbox: FrameQueue) -> Call:
    call = Call(call_id, OpenCall("Decode", "request", "", 0.0), outbox)
    program.opened(call)
    start = vae_pb2.DecodeStart(params=params_to_proto(PARAMS))
    program.message(call, vae_pb2.DecodeRequest(start=start).SerializeToString())
    for message in bundle_frames({"latents": torch.zeros(1, 3)}):
        program.message(call, message)
    return call


def kinds(outbox: FrameQueue) -> list[Kind]:
    frames: list[Frame] = outbox.take(0) or []
    return [frame.kind for frame in frames]


def test_a_slow_encoder_holds_up_no_decode(notes):
    program, outbox = rank.VaeProgram(CONFIG), FrameQueue(1 << 20)
    calls = [decode(program, call_id, outbox) for call_id in (1, 2)]
    while program.tick():
        """It says that there is more to do as long as an answer is due."""
    assert notes == ["decoded", "decoded", "encoded", "encoded"]
    assert [call.closed for call in calls] == [True, True]
    assert kinds(outbox).count(Kind.FINISH) == 2


def test_a_call_that_is_cancelled_before_its_answer_gets_none(notes):
    program, outbox = rank.VaeProgram(CONFIG), FrameQueue(1 << 20)
    call = decode(program, 1, outbox)
    while "decoded" not in notes:
        assert program.tick()
    assert program.tick(), "the engine has ended, its answer is due"
    program.cancelled(call)
    assert not program.tick()
    assert notes == ["decoded"]
    assert kinds(outbox) == []
