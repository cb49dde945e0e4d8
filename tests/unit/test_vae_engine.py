"""The VAE's engine on a VAE made of a few lines: batches, failures that stay alone, and the fit for previews."""

from __future__ import annotations

import io
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from services.errors import DeviceLost, Internal, InvalidRequest, NonFinite, OutOfMemory, ServiceError
from services.failures import failure_of
from services.family import Inputs, Tensors, VaePart, VaePlan
from services.request import GenerationParams, Limits, Media, ResolvedParams, resolve
from vae_svc import input_clips
from vae_svc.engine import MAX_BEGUN, VaeChunk, VaeEngine, VaeJob, VaeResult, to_pixels
from vae_svc.latent_rgb_fit import fit_latent_rgb, synthetic_pictures

PARAMS = resolve(GenerationParams(model="m", prompt="a cat", width=64, height=64), Limits(), seed=0)
COVERED_PX, CHUNK = 8, 4


class FakeVae:
    """Decodes latents [1, 3] to pictures of one colour; runs out of memory and refuses when it is told to."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def decode(self, _model: object, rows: Sequence[Tensors], params: ResolvedParams) -> Iterator[torch.Tensor]:
        self.batches.append(len(rows))
        for start in range(0, params.num_frames, CHUNK):
            yield self.chunk(rows, params, min(CHUNK, params.num_frames - start))

    def chunk(self, rows: Sequence[Tensors], params: ResolvedParams, frames: int) -> torch.Tensor:
        colours = torch.cat([row["latents"] for row in rows])
        if bool((colours == 7).any()):
            raise torch.OutOfMemoryError("too large")
        if bool((colours == 9).any()):
            raise InvalidRequest("9 cannot be decoded")
        if bool((colours == 11).any()):
            raise KeyError("a bug")
        if bool((colours == 13).any()):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return colours[:, None, :, None, None].expand(-1, frames, 3, params.height, params.width)

    def encode(self, _model: object, inputs: Inputs, _params: ResolvedParams) -> Tensors:
        return {"image/0": torch.from_numpy(inputs["image"][0].astype(np.float32)).mean((0, 1, 2))}

    def part(self, **changes: object) -> VaePart:
        part = VaePart(
            load=lambda *_: None,
            plan=VaePlan(),
            decode=self.decode,
            encode=self.encode,
            latent_geometry=lambda _model: (5, COVERED_PX, 1),
        )
        return replace(part, **changes)


@pytest.fixture
def fake() -> FakeVae:
    return FakeVae()


def job(name: str, *colour: float, **changes: int) -> VaeJob:
    return VaeJob(name, replace(PARAMS, **changes), {"latents": torch.tensor([colour])})


def picture_of(*colour: int) -> Media:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return Media("image/png", file.getvalue())


def run(engine: VaeEngine) -> dict[str, ServiceError | tuple[int, ...]]:
    """Each job's error, or the colour of its first pixel."""
    colours: dict[str, tuple[int, ...]] = {}
    seen: dict[str, ServiceError | tuple[int, ...]] = {}
    while engine.busy:
        for event in engine.tick():
            name = event.job.request_id
            if isinstance(event, VaeChunk):
                colours[name] = tuple(event.frames[0, 0, 0].tolist())
            else:
                seen[name] = event.error or colours[name]
                assert event.busy_s >= 0
    return seen


def test_jobs_of_one_shape_share_a_batch(fake):
    engine = VaeEngine(fake.part(), None, 2)
    for index, width in enumerate((64, 96, 64, 64)):
        engine.submit(job(str(index), 1.0, -1.0, 0.0, width=width))
    assert run(engine) == dict.fromkeys("0123", (255, 0, 128))
    assert fake.batches == [2, 1, 1]


def test_one_bad_job_fails_alone(fake):
    engine = VaeEngine(fake.part(), None, 8)
    colours = {"good": (1.0,) * 3, "large": (7.0,) * 3, "wrong": (9.0,) * 3, "black": (float("nan"),) * 3}
    colours["bug"] = (11.0,) * 3
    for name, colour in colours.items():
        engine.submit(job(name, *colour))
    seen = run(engine)
    assert seen["good"] == (255, 255, 255)
    assert isinstance(seen["large"], OutOfMemory)
    assert isinstance(seen["wrong"], InvalidRequest)
    assert isinstance(seen["black"], NonFinite)
    assert isinstance(seen["bug"], Internal)


def test_a_bug_in_an_encode_fails_it_alone_and_a_lost_device_ends_the_process(fake):
    engine = VaeEngine(fake.part(encode=lambda *_: {}["a bug"]), None, 8)
    engine.submit(VaeJob("bug", replace(PARAMS, inputs=(picture_of(10, 20, 30),))))
    engine.submit(job("good", 1.0, 1.0, 1.0))
    [failed] = engine.tick()
    assert isinstance(failed.error, Internal)
    assert run(engine) == {"good": (255, 255, 255)}
    engine.submit(job("lost", 13.0, 13.0, 13.0))
    with pytest.raises(RuntimeError, match="CUDA error"):
        engine.tick()


def test_jobs_that_wait_can_be_aborted(fake):
    engine = VaeEngine(fake.part(), None, 8)
    engine.submit(job("kept", 0.0, 0.0, 0.0))
    engine.submit(job("gone", 0.0, 0.0, 0.0))
    engine.abort("gone")
    engine.abort("never there")
    assert engine.metrics() == {"vae_waiting": 1}
    assert list(run(engine)) == ["kept"]


def test_a_clip_comes_alone_in_chunks_and_an_abort_ends_it_between_two(fake):
    engine = VaeEngine(fake.part(), None, 8)
    for name in ("whole", "aborted"):
        engine.submit(job(name, 0.0, 0.0, 0.0, num_frames=9))
    chunks: dict[str, list[tuple[int, int]]] = {"whole": [], "aborted": []}
    ended = []
    while engine.busy:
        for event in engine.tick():
            if isinstance(event, VaeResult):
                ended.append(event.job.request_id)
                continue
            chunks[event.job.request_id].append((event.first_frame, len(event.frames)))
            if event.job.request_id == "aborted":
                engine.abort("aborted")
    assert chunks == {"whole": [(0, 4), (4, 4), (8, 1)], "aborted": [(0, 4)]}
    assert (ended, fake.batches) == (["whole"], [1, 1])


def test_while_nobody_takes_a_clips_frames_others_go_on(fake):
    engine = VaeEngine(fake.part(), None, 8)
    for name in ("stuck", "other"):
        engine.submit(job(name, 0.0, 0.0, 0.0, num_frames=9))
    [first] = engine.tick()
    assert (first.job.request_id, first.first_frame) == ("stuck", 0)
    others = [event for _ in range(4) for event in engine.tick({"stuck"})]
    assert {event.job.request_id for event in others} == {"other"}
    assert isinstance(others[-1], VaeResult)
    assert engine.tick({"stuck"}) == [] and engine.busy
    engine.submit(job("later", 0.0, 0.0, 0.0))
    rest = [event for _ in range(5) for event in engine.tick()]
    assert order_of(rest) == ["later 0", "later end", "stuck 4", "stuck 8", "stuck end"]


def order_of(events: list[VaeChunk | VaeResult]) -> list[str]:
    return [f"{event.job.request_id} {getattr(event, 'first_frame', 'end')}" for event in events]


def test_an_encode_or_a_picture_comes_between_two_chunks_of_a_clip(fake):
    engine = VaeEngine(fake.part(), None, 2)
    for name in ("clip", "next clip"):
        engine.submit(job(name, 0.0, 0.0, 0.0, num_frames=9))
    seen = engine.tick()
    for name in ("a", "b", "c"):
        engine.submit(job(name, 0.0, 0.0, 0.0))
    engine.submit(VaeJob("encode", replace(PARAMS, inputs=(picture_of(1, 2, 3),))))
    while engine.busy:
        seen += engine.tick()
    assert order_of(seen) == [
        *("clip 0", "a 0", "b 0", "a end", "b end", "clip 4", "c 0", "c end", "clip 8", "clip end"),
        *("next clip 0", "encode end", "next clip 4", "next clip 8", "next clip end"),
    ]


def test_an_encode_without_memory_beside_a_clip_is_tried_again_alone(fake):
    tries: list[bool] = []

    def encode(*_: object) -> Tensors:
        tries.append(bool(engine._begun))
        if engine._begun:
            raise torch.OutOfMemoryError("too large")
        return {"image/0": torch.zeros(3)}

    engine = VaeEngine(fake.part(encode=encode), None, 1)
    engine.submit(job("clip", 0.0, 0.0, 0.0, num_frames=9))
    engine.tick()
    engine.submit(VaeJob("encode", replace(PARAMS, inputs=(picture_of(1, 2, 3),))))
    seen = [event for _ in range(6) for event in engine.tick()]
    assert order_of(seen) == ["clip 4", "clip 8", "clip end", "encode end"]
    assert (tries, seen[-1].error) == ([True, False], None)


def test_what_ran_out_of_memory_holds_none():
    held: list[weakref.ref[torch.Tensor]] = []

    def run_out() -> None:
        values = torch.zeros(3)
        held.append(weakref.ref(values))
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        run_out()
    assert held[0]() is not None
    assert isinstance(failure_of(caught.value), OutOfMemory)
    assert held[0]() is None


def test_no_more_clips_than_there_is_memory_for_wait_half_decoded(fake):
    engine = VaeEngine(fake.part(), None, 8)
    names = [f"stuck{index}" for index in range(MAX_BEGUN)]
    for name in (*names, "next"):
        engine.submit(job(name, 0.0, 0.0, 0.0, num_frames=9))
    begun = [event.job.request_id for _ in range(MAX_BEGUN) for event in engine.tick(names)]
    assert begun == names
    assert engine.tick(names) == []
    engine.abort(names[1])
    assert [event.job.request_id for event in engine.tick(names)] == ["next"], "an abort gives back its place"


def test_what_has_no_memory_beside_a_clip_that_waits_is_tried_again_alone(fake):
    engine = VaeEngine(fake.part(), None, 8)
    engine.submit(job("stuck", 0.0, 0.0, 0.0, num_frames=9))
    engine.submit(job("large", 7.0, 7.0, 7.0))
    engine.tick()
    assert engine.tick({"stuck"}) == []
    seen = run(engine)
    assert list(seen) == ["stuck", "large"]
    assert isinstance(seen["large"], OutOfMemory), "this one has none alone either"
    assert fake.batches == [1, 1, 1]


def test_one_of_a_batch_can_be_aborted_while_it_is_in_work(fake):
    engine = VaeEngine(fake.part(), None, 8)
    for name in ("kept", "gone"):
        engine.submit(job(name, 1.0, 1.0, 1.0))
    assert len(engine.tick()) == 2
    engine.abort("gone")
    [result] = engine.tick()
    assert (result.job.request_id, result.error, engine.busy) == ("kept", None, False)


def test_pictures_are_encoded_or_refused(fake):
    engine = VaeEngine(fake.part(), None, 8)
    whole = picture_of(10, 20, 30)
    cut = Media("image/png", whole.data[:45])
    for name, inputs in (("whole", (whole,)), ("cut", (cut,)), ("none", ())):
        engine.submit(VaeJob(name, replace(PARAMS, inputs=inputs)))
    results = {result.job.request_id: result for _ in range(3) for result in engine.tick()}
    assert results["whole"].tensors["image/0"].tolist() == [10, 20, 30]
    for name in ("cut", "none"):
        assert isinstance(results[name].error, InvalidRequest)
        assert results[name].error.param == "inputs"


class Reading:
    """Of clips, which goes on until it is told how it ended."""

    def __init__(self, *_: object) -> None:
        self.outcome: list[np.ndarray] | ServiceError | None = None
        self.closed = False

    def is_done(self) -> bool:
        return self.outcome is not None

    def frames(self) -> list[np.ndarray]:
        if isinstance(self.outcome, ServiceError):
            raise self.outcome
        return self.outcome

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Reading]:
    begun: list[Reading] = []

    def begin(*_: object) -> Reading:
        begun.append(Reading())
        return begun[-1]

    monkeypatch.setattr(input_clips, "ClipReading", begin)
    return begun


def test_others_go_on_while_an_input_clip_is_read(fake, readings):
    part = fake.part(encode=lambda _model, inputs, _params: {"seen": torch.tensor(inputs["video"][0])})
    engine = VaeEngine(part, None, 1)
    clip = replace(PARAMS, inputs=(Media("video/mp4", b"", "video"),))
    for name in ("killed", "read", "left"):
        engine.submit(VaeJob(name, clip))
    engine.submit(job("picture", 1.0, 1.0, 1.0))
    engine.tick()
    assert [event.job.request_id for _ in range(3) for event in engine.tick()] == ["picture", "picture"]
    [killed] = readings
    killed.outcome = DeviceLost("killed")
    [failed] = engine.tick()
    assert (failed.job.request_id, type(failed.error)) == ("killed", DeviceLost)
    assert engine.tick() == [] and len(readings) == 2, "one is read at a time"
    engine.abort("left")
    readings[1].outcome = [np.full((1, 2, 2, 3), 7, np.uint8)]
    [read] = engine.tick()
    assert (read.job.request_id, read.tensors["seen"].unique().tolist()) == ("read", [7])
    assert not engine.busy
    engine.submit(VaeJob("aborted", clip))
    engine.tick()
    engine.abort("aborted")
    assert readings[2].closed and not engine.busy


def test_clips_without_memory_beside_another_are_encoded_before_the_next_begins(fake, readings):
    def encode(_model: object, inputs: Inputs, _params: ResolvedParams) -> Tensors:
        if engine._begun:
            raise torch.OutOfMemoryError("too large")
        return {"seen": torch.tensor(inputs["video"][0])}

    engine = VaeEngine(fake.part(encode=encode), None, 1)
    clip = replace(PARAMS, inputs=(Media("video/mp4", b"", "video"),))
    seen: list[VaeChunk | VaeResult] = []
    engine.submit(job("first", 0.0, 0.0, 0.0, num_frames=9))
    engine.submit(VaeJob("encode", clip))
    for number in range(12):
        engine.submit(job(f"clip{number}", 0.0, 0.0, 0.0, num_frames=9))
        seen += engine.tick()
        for reading in readings:
            reading.outcome = [np.full((1, 2, 2, 3), 7, np.uint8)]
    assert order_of(seen)[:5] == ["first 0", "first 4", "first 8", "first end", "encode end"]
    assert seen[4].tensors["seen"].unique().tolist() == [7]
    assert len(readings) == 1, "they are read once"


def test_pixels_are_rounded_and_clipped():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 5.0]).view(1, 1, 1, 1, 5).expand(1, 1, 3, 1, 5)
    assert to_pixels(values)[0, 0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


# ---- The fit for previews --------------------------------------------------------------------------------------------


def test_a_linear_vae_is_fitted_exactly(fake):
    generator = torch.Generator().manual_seed(1)
    mixing, offset = torch.randn(3, 5, generator=generator), torch.randn(5, generator=generator)

    def latents(_model: object, pixels: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.avg_pool2d(pixels, COVERED_PX)
        return torch.einsum("bchw,cd->bdhw", pooled, mixing) + offset[:, None, None]

    fit = fit_latent_rgb(fake.part(picture_latents=latents), None)
    pictures = torch.rand(2, 3, 32, 32, generator=generator)
    rgb = latents(None, 2 * pictures - 1).movedim(1, -1) @ fit.weight + fit.bias
    expected = torch.nn.functional.avg_pool2d(pictures, COVERED_PX).movedim(1, -1)
    assert fit.weight.shape == (5, 3) and fit.bias.shape == (3,)
    assert torch.allclose(rgb, expected, atol=1e-4)


def test_without_an_encoder_there_is_no_fit(fake):
    assert fit_latent_rgb(fake.part(), None) is None


def test_synthetic_pictures_are_the_same_and_full_of_colours():
    pictures = synthetic_pictures(16, 64)
    assert torch.equal(pictures, synthetic_pictures(16, 64))
    assert pictures.shape == (16, 3, 64, 64)
    assert pictures.min() == 0 and pictures.max() == 1
    flat, smooth = pictures[1::2].flatten(2), pictures[::2].flatten(2)
    assert all(len(torch.unique(picture, dim=1).T) <= 6 for picture in flat)
    assert all(len(torch.unique(picture, dim=1).T) > 100 for picture in smooth)
