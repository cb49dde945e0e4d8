"""The interpolator's rank: a clip that is encoded slowly holds up no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from interpolation_svc import rank
from interpolation_svc.engine import InterpolationEngine
from interpolation_svc.ifnet import IFNet, IFNetSpec
from protos import interpolation_pb2, vae_pb2
from services import clip_writer
from services.channel import CALL_ROOM_BYTES, Frame, FrameQueue, Kind, OpenCall
from services.config import ModelSection, ServiceSection, StageConfig
from services.rank_process import Call
from services.request import GenerationParams, Limits, resolve
from services.tensors import bundle_frames
from services.wire import params_to_proto

CONFIG = StageConfig(service=ServiceSection(name="i", port=0), model=ModelSection(name="m", source="packaged"))
LIMITS = Limits(
    output="video",
    min_side_px=32,
    max_frames=81,
    default_frames=17,
    default_fps=16.0,
    default_width=32,
    default_height=32,
)
FRAMES, SLOW_FPS = 8, 1.0


def begin(program: rank.InterpolationProgram, call_id: int, outbox: FrameQueue, fps: float) -> Call:
    call = Call(call_id, OpenCall("Interpolate", "request", "", 0.0), outbox)
    program.opened(call)
    wish = GenerationParams(model="m", prompt="p", width=32, height=32, num_frames=FRAMES, fps=fps)
    start = interpolation_pb2.InterpolateStart(
        params=params_to_proto(resolve(wish, LIMITS, seed=0)), exponent=1, scale=1.0, num_frames=FRAMES
    )
    program.message(call, interpolation_pb2.InterpolateRequest(start=start).SerializeToString())
    for message in bundle_frames({"frames": torch.zeros(FRAMES, 32, 32, 3, dtype=torch.uint8)}):
        program.message(call, message)
    program.half_closed(call)
    return call


@pytest.fixture
def go_on(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The encoder of slow clips stands still until then; an encoded clip says how many frames it has."""
    event = threading.Event()

    def encode(chunks: Iterator[clip_writer.Chunk], _num_frames: int, _quality: int, fps: float) -> bytes:
        assert fps != 2 * SLOW_FPS or event.wait(20)
        return str(sum(len(frames) for frames, _ in chunks)).encode()

    torch.manual_seed(0)
    net = IFNet(IFNetSpec((16, 12, 8, 8), encodes=True)).eval().requires_grad_(False)
    monkeypatch.setattr(clip_writer, "_mp4", encode)
    monkeypatch.setattr(rank, "open_engine", lambda _config: InterpolationEngine(net, 2))
    return event


def test_a_clip_that_is_encoded_slowly_holds_up_no_other(go_on: threading.Event) -> None:
    program, outbox = rank.InterpolationProgram(CONFIG), FrameQueue(1 << 20)
    calls = [begin(program, call_id, outbox, fps) for call_id, fps in enumerate((SLOW_FPS, SLOW_FPS, 16.0))]
    stuck, left, other = calls
    while not other.closed:
        assert program.tick()
    left.cancelled = True
    begun_s = time.monotonic()
    program.cancelled(left)
    assert time.monotonic() - begun_s < 1, "an abort waits for no encoder"
    assert program.tick() and not stuck.closed
    go_on.set()
    while program.tick():
        """It is interpolated to its end."""
    answers = [vae_pb2.DecodeResponse.FromString(f.payload) for f in outbox.take(0) if f.kind is Kind.MESSAGE]
    assert [answer.chunk.data for answer in answers if answer.HasField("chunk")] == [b"15", b"15"]
    assert stuck.closed


def test_a_large_file_leaves_as_it_is_taken_and_holds_up_no_other(
    go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = bytes(5 * CALL_ROOM_BYTES) + b"end"
    sizes = {2 * SLOW_FPS: large, 32.0: b"small"}
    monkeypatch.setattr(clip_writer, "_mp4", lambda chunks, _frames, _quality, fps: list(chunks) and sizes[fps])
    # More than this would stand still for ever: nobody reads.
    program, outbox = rank.InterpolationProgram(CONFIG), FrameQueue(4 * CALL_ROOM_BYTES)
    stuck, other = (begin(program, call_id, outbox, fps) for call_id, fps in ((1, SLOW_FPS), (2, 16.0)))
    while not other.closed or not stuck.is_behind():
        assert program.tick()
    frames: list[Frame] = []
    while program.tick():
        frames += (taken := outbox.take(0))
        stuck.taken(sum(len(frame.payload) for frame in taken if frame.call_id == stuck.id))
    frames += outbox.take(0)
    answers = [vae_pb2.DecodeResponse.FromString(f.payload) for f in frames if f.call_id == 1 and f.payload]
    assert b"".join(answer.chunk.data for answer in answers) == large
    assert stuck.closed
