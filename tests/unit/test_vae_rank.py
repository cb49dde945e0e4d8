"""The VAE's rank: what was decoded is encoded beside what comes next."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from protos import vae_pb2
from services import clip_writer
from services.channel import CALL_ROOM_BYTES, Frame, FrameQueue, Kind, OpenCall
from services.config import ModelSection, ServiceSection, StageConfig
from services.family import ChunkWithSound
from services.rank_process import Call
from services.request import Limits, ResolvedParams
from services.tensor_wire import frame_of
from services.tensors import BundleReader, bundle_frames
from services.wire import params_to_proto, resolved_from_proto
from tests.unit.test_vae_engine import CHUNK, PARAMS, FakeVae
from vae_svc import rank
from vae_svc.engine import VaeEngine

CONFIG = StageConfig(service=ServiceSection(name="vae", port=0), model=ModelSection(name="m", source="none"))

SLOW_FPS = 1.0


class Writer:
    """A ClipWriter that notes what happens."""

    made_bytes = 0
    behind_s = 0.0

    def __init__(self, notes: list[str], *_options: object) -> None:
        self._notes = notes
        self._looks = -1

    def end(self) -> None:
        """From now on it is looked at."""
        self._looks = 0

    def is_full(self) -> bool:
        """After the end, at the first look."""
        self._looks += self._looks >= 0
        return self._looks == 1

    def is_done(self, _timeout_s: float = 0.0) -> bool:
        """Whoever waits for it looks again."""
        return False

    def add(self, frames: object, sound: object) -> None:
        self._notes.append("decoded")

    def finish(self) -> tuple[str, bytes]:
        self._notes.append("encoded")
        return "image/png", b"picture"

    def close(self) -> None:
        """Nothing runs here."""


@pytest.fixture(autouse=True)
def any_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no folder of weights, and pictures and clips come of one VAE."""
    monkeypatch.setattr(rank, "open_model", lambda _: None)
    monkeypatch.setattr(rank, "limits_of", lambda *_: Limits())
    monkeypatch.setattr(rank, "checked_from_proto", lambda proto, _: resolved_from_proto(proto))


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    taken: list[str] = []
    monkeypatch.setattr(rank, "open_engine", lambda *_: VaeEngine(FakeVae().part(), None, 1))
    monkeypatch.setattr(rank, "ClipWriter", lambda *options: Writer(taken, *options))
    return taken


def decode(
    program: rank.VaeProgram,
    call_id: int,
    outbox: FrameQueue,
    params: ResolvedParams = PARAMS,
    *,
    frames_only: bool = False,
) -> Call:
    call = Call(call_id, OpenCall("Decode", "request", "", 0.0), outbox)
    program.opened(call)
    start = vae_pb2.DecodeStart(params=params_to_proto(params), frames_only=frames_only)
    program.message(call, vae_pb2.DecodeRequest(start=start).SerializeToString())
    for message in bundle_frames({"latents": torch.zeros(1, 3)}):
        program.message(call, message)
    return call


def tick(program: rank.VaeProgram, *calls: Call) -> bool:
    """As a rank's loop does it."""
    for call in calls:
        call.has_room = not call.is_full()
    return program.tick()


def kinds(outbox: FrameQueue) -> list[Kind]:
    frames: list[Frame] = outbox.take(0) or []
    return [frame.kind for frame in frames]


def test_a_slow_encoder_holds_up_no_decode(notes):
    program, outbox = rank.VaeProgram(CONFIG), FrameQueue(1 << 20)
    calls = [decode(program, call_id, outbox) for call_id in (1, 2)]
    while tick(program, *calls):
        """It says that there is more to do as long as an answer is due."""
    assert notes == ["decoded", "decoded", "encoded", "encoded"]
    assert [call.closed for call in calls] == [True, True]
    assert kinds(outbox).count(Kind.FINISH) == 2


def test_a_call_that_is_cancelled_before_its_answer_gets_none(notes):
    program, outbox = rank.VaeProgram(CONFIG), FrameQueue(1 << 20)
    call = decode(program, 1, outbox)
    while "decoded" not in notes:
        assert tick(program, call)
    assert tick(program, call), "the engine has ended, its answer is due"
    program.cancelled(call)
    assert not tick(program, call)
    assert notes == ["decoded"]
    assert kinds(outbox) == []


def test_a_file_goes_with_its_call(monkeypatch):
    """Not when garbage is collected: on an idle rank that may be much later."""
    writers: list[weakref.ref[Writer]] = []

    def make(*options: object) -> Writer:
        writer = Writer([], *options)
        writers.append(weakref.ref(writer))
        return writer

    monkeypatch.setattr(rank, "open_engine", lambda *_: VaeEngine(FakeVae().part(), None, 1))
    monkeypatch.setattr(rank, "ClipWriter", make)
    program, outbox = rank.VaeProgram(CONFIG), FrameQueue(1 << 20)
    gc.disable()
    try:
        call = decode(program, 1, outbox)
        while tick(program, call):
            """It is decoded to its end."""
        assert call.closed
        assert [writer() for writer in writers] == [None]
    finally:
        gc.enable()


def test_a_clip_that_is_encoded_slowly_holds_up_no_other(monkeypatch):
    """The encoder of the first clip stands still; the second is answered meanwhile, and the first when it goes on."""
    go_on = threading.Event()

    def encode(chunks: Iterator[clip_writer.Chunk], num_frames: int, _quality: int, fps: float) -> bytes:
        assert fps != SLOW_FPS or go_on.wait(20)
        return str(sum(len(frames) for frames, _ in chunks)).encode()

    monkeypatch.setattr(clip_writer, "_mp4", encode)
    monkeypatch.setattr(rank, "open_engine", lambda *_: VaeEngine(FakeVae().part(), None, 1))
    program, outbox = rank.VaeProgram(CONFIG), FrameQueue(1 << 20)
    clip = replace(PARAMS, num_frames=40, output_format="mp4")
    stuck, left, other = (
        decode(program, call_id, outbox, replace(clip, fps=fps))
        for call_id, fps in enumerate((SLOW_FPS, SLOW_FPS, 16.0), start=1)
    )
    while not other.closed:
        assert tick(program, stuck, left, other)
    left.cancelled = True
    begun_s = time.monotonic()
    program.cancelled(left)
    assert time.monotonic() - begun_s < 1, "an abort waits for no encoder"
    assert tick(program, stuck) and not stuck.closed
    go_on.set()
    while tick(program, stuck):
        """It is decoded to its end."""
    answers = [vae_pb2.DecodeResponse.FromString(f.payload) for f in outbox.take(0) if f.kind is Kind.MESSAGE]
    assert [answer.chunk.data for answer in answers if answer.HasField("chunk")] == [b"40", b"40"]
    assert stuck.closed


def test_a_large_file_leaves_as_it_is_taken_and_holds_up_no_other(monkeypatch):
    """Of five times what a call has room for, which nobody takes, so much is sent; the rest when it is taken."""
    large = bytes(5 * CALL_ROOM_BYTES) + b"end"
    sizes = {SLOW_FPS: large, 16.0: b"small"}
    monkeypatch.setattr(clip_writer, "_mp4", lambda chunks, _frames, _quality, fps: list(chunks) and sizes[fps])
    monkeypatch.setattr(rank, "open_engine", lambda *_: VaeEngine(FakeVae().part(), None, 1))
    # More than this would stand still for ever: nobody reads.
    program, outbox = rank.VaeProgram(CONFIG), FrameQueue(4 * CALL_ROOM_BYTES)
    clip = replace(PARAMS, num_frames=4, output_format="mp4")
    stuck, other = (
        decode(program, call_id, outbox, replace(clip, fps=fps)) for call_id, fps in enumerate(sizes, start=1)
    )
    while not other.closed or not stuck.is_behind():
        assert tick(program, stuck, other)
    frames: list[Frame] = []
    while tick(program, stuck):
        frames += (taken := outbox.take(0))
        assert sum(len(frame.payload) for frame in taken) < 3 * CALL_ROOM_BYTES
        stuck.taken(sum(len(frame.payload) for frame in taken if frame.call_id == stuck.id))
    frames += outbox.take(0)
    answers = [vae_pb2.DecodeResponse.FromString(f.payload) for f in frames if f.call_id == 1 and f.payload]
    assert b"".join(answer.chunk.data for answer in answers) == large
    assert [answer.media.nbytes for answer in answers if answer.HasField("media")] == [len(large)]
    assert stuck.closed


def test_raw_frames_leave_while_later_ones_are_decoded(monkeypatch):
    monkeypatch.setattr(rank, "open_engine", lambda *_: VaeEngine(FakeVae().part(), None, 1))
    program, outbox = rank.VaeProgram(CONFIG), FrameQueue(1 << 24)
    clip = replace(PARAMS, num_frames=3 * CHUNK, output_format="raw")
    call = decode(program, 1, outbox, clip)
    assert tick(program, call)
    first = [vae_pb2.DecodeResponse.FromString(frame.payload) for frame in outbox.take(0)]
    assert first[0].media.nbytes == clip.num_frames * clip.height * clip.width * 3
    assert sum(len(answer.chunk.data) for answer in first) * 3 == first[0].media.nbytes
    while tick(program, call):
        """It is decoded to its end."""
    rest = [vae_pb2.DecodeResponse.FromString(f.payload) for f in outbox.take(0) if f.kind is Kind.MESSAGE]
    assert sum(len(answer.chunk.data) for answer in first + rest) == first[0].media.nbytes
    assert rest[-1].HasField("usage") and call.closed


def large(num_frames: int) -> ResolvedParams:
    """A chunk of a clip has 27 MiB, a picture 48."""
    side_px = 4096 if num_frames == 1 else 1536
    return replace(PARAMS, width=side_px, height=side_px, num_frames=num_frames, output_format="raw")


@pytest.mark.parametrize(
    ("num_frames", "frames_only"), [(3 * CHUNK, False), (3 * CHUNK, True), (1, False)], ids=["raw", "frames", "picture"]
)
def test_large_frames_leave_as_they_are_taken_and_hold_up_no_other(monkeypatch, num_frames, frames_only):
    engine = VaeEngine(FakeVae().part(), None, 2)
    monkeypatch.setattr(rank, "open_engine", lambda *_: engine)
    program, outbox, wish = rank.VaeProgram(CONFIG), FrameQueue(64 << 20), large(num_frames)
    stuck = decode(program, 1, outbox, wish, frames_only=frames_only)
    # Of the same batch, if it is a picture.
    other = decode(program, 2, outbox, replace(wish, output_format="jpeg") if num_frames == 1 else PARAMS)
    while not other.closed or not stuck.is_behind():
        assert tick(program, stuck, other)
    for _ in range(5):
        assert tick(program, stuck) and not stuck.closed
    frames = outbox.take(0)
    assert sum(len(frame.payload) for frame in frames if frame.call_id == stuck.id) < 3 * CALL_ROOM_BYTES
    stuck.taken(sum(len(frame.payload) for frame in frames if frame.call_id == stuck.id))
    while tick(program, stuck):
        frames += (taken := outbox.take(0))
        stuck.taken(sum(len(frame.payload) for frame in taken))
    messages = [f.payload for f in [*frames, *outbox.take(0)] if f.call_id == stuck.id and f.kind is Kind.MESSAGE]
    assert bytes_of(messages) == wish.num_frames * wish.height * wish.width * 3
    assert vae_pb2.DecodeResponse.FromString(messages[-1]).HasField("usage") and stuck.closed


def test_sound_counts_as_frames_do(monkeypatch):
    """Of sound beside one small picture, eight times what a call has room for, so much is sent as is taken."""

    class LoudVae(FakeVae):
        def decode(self, model, rows, params):
            for frames in super().decode(model, rows, params):
                yield ChunkWithSound(frames, torch.zeros(len(rows), 2, CALL_ROOM_BYTES), 48000)

    monkeypatch.setattr(rank, "open_engine", lambda *_: VaeEngine(LoudVae().part(), None, 1))
    program, outbox = rank.VaeProgram(CONFIG), FrameQueue(8 * CALL_ROOM_BYTES)
    call = decode(program, 1, outbox, frames_only=True)
    frames: list[Frame] = []
    busy = True
    while busy:
        busy = tick(program, call)
        frames += (taken := outbox.take(0))
        assert sum(len(frame.payload) for frame in taken) < 3 * CALL_ROOM_BYTES
        call.taken(sum(len(frame.payload) for frame in taken))
    messages = [frame.payload for frame in frames if frame.kind is Kind.MESSAGE]
    assert bytes_of(messages) == 8 * CALL_ROOM_BYTES + PARAMS.height * PARAMS.width * 3 and call.closed


def bytes_of(messages: list[bytes]) -> int:
    """Of raw media, or of tensors."""
    frames = [frame for frame in map(frame_of, messages) if frame is not None]
    if not frames:
        return sum(len(vae_pb2.DecodeResponse.FromString(message).chunk.data) for message in messages)
    reader = BundleReader()
    bundles = [bundle for bundle in map(reader.feed, frames) if bundle is not None]
    return sum(tensor.nbytes for bundle in bundles for tensor in bundle.tensors.values())
