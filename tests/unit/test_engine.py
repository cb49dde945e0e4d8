"""The engine against the stock pipeline: alone, interleaved, resumed, batched; aborts; non-finite latents."""

from __future__ import annotations

import pytest
import torch
from diffusers import QwenImagePipeline

from dit_svc.engine import Checkpointed, DenoiseJob, DitEngine, Failed, Finished, Stepped
from services.config import EngineSection
from services.errors import InvalidRequest, NonFinite
from services.families import load_family
from services.family import TextInput
from services.request import GenerationParams, ResolvedParams, resolve
from services.tensors import Bundle
from services.weights import open_source

CPU = torch.device("cpu")
FAMILY = load_family("qwen_image")


class Tiny:
    """The tiny model, once by our parts and once as the stock pipeline."""

    def __init__(self, folder) -> None:
        FAMILY.tiny(folder, "t2i", 0)
        source = open_source(str(folder))
        self.text = FAMILY.text.load(source, CPU, torch.float32)
        self.dit = FAMILY.dit.load(source, CPU, torch.float32)
        self.pipeline = QwenImagePipeline.from_pretrained(folder, dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)

    def params(self, prompt: str, seed: int, *, steps: int = 4, width: int = 64, guidance: float = 4.0):
        wish = GenerationParams(
            model="m", prompt=prompt, width=width, height=80, steps=steps, seed=seed, guidance=guidance
        )
        return resolve(wish, FAMILY.variants["t2i"].limits, seed=0)

    def job(self, name: str, params: ResolvedParams, checkpoint: Bundle | None = None) -> DenoiseJob:
        branches = {"positive": params.prompt} | ({"negative": params.negative_prompt} if params.guidance > 1 else {})
        conditions = {}
        for branch, text in branches.items():
            [tensors] = FAMILY.text.encode(self.text, [TextInput(text)])
            conditions |= {f"{branch}/{key}": value[None] for key, value in tensors.items()}
        return DenoiseJob(name, params, conditions, checkpoint)

    def stock(self, params: ResolvedParams) -> torch.Tensor:
        return self.pipeline(
            prompt=params.prompt,
            negative_prompt=params.negative_prompt,
            true_cfg_scale=params.guidance,
            width=params.width,
            height=params.height,
            num_inference_steps=params.steps,
            generator=torch.Generator().manual_seed(params.seed),
            output_type="latent",
        ).images

    def engine(self, **options) -> DitEngine:
        return DitEngine(self.dit, FAMILY.dit, EngineSection(**options))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with torch.inference_mode():
        yield Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def run(engine: DitEngine, events: list) -> dict[str, torch.Tensor]:
    while engine.busy:
        events += engine.tick()
    return {event.request_id: event.tensors["latents"] for event in events if isinstance(event, Finished)}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_alone_equals_the_stock_pipeline_bit_for_bit(tiny, guidance):
    params = tiny.params("a red circle on blue", 3, guidance=guidance)
    engine = tiny.engine(branches="serial", max_batch=1)
    engine.admit(tiny.job("a", params))
    assert torch.equal(run(engine, [])["a"], tiny.stock(params))


def test_three_interleaved_equal_the_stock_pipeline_bit_for_bit(tiny):
    wishes = {
        "a": tiny.params("a red circle", 1, steps=5),
        "b": tiny.params("a photo of a large green square on a blue background", 2, width=96),
        "c": tiny.params("dog", 3, steps=3),
    }
    engine, events = tiny.engine(branches="serial", max_batch=1), []
    for name, params in wishes.items():
        engine.admit(tiny.job(name, params))
        events += engine.tick()
    results = run(engine, events)
    for name, params in wishes.items():
        assert torch.equal(results[name], tiny.stock(params)), name
    order = [event.request_id for event in events if isinstance(event, Stepped)]
    assert order != sorted(order), "the requests ran one after the other"


def test_resumed_from_a_checkpoint_equals_the_stock_pipeline_bit_for_bit(tiny):
    params = tiny.params("a small star", 7)
    engine, events = tiny.engine(branches="serial", max_batch=1), []
    engine.admit(tiny.job("a", params))
    events += engine.tick() + engine.tick()
    engine.request_checkpoint("a", stop=True)
    events += engine.tick()
    [checkpoint] = [event for event in events if isinstance(event, Checkpointed)]
    assert checkpoint.step == 2
    assert not engine.busy
    other = tiny.engine(branches="serial", max_batch=1)
    other.admit(tiny.job("a", params, Bundle(dict(checkpoint.tensors), checkpoint.attributes)))
    assert torch.equal(run(other, [])["a"], tiny.stock(params))


def test_batched_at_different_steps_and_lengths_stays_within_tolerance(tiny):
    wishes = {
        "a": tiny.params("a red circle", 1, steps=6),
        "b": tiny.params("a photo of a large green square on a blue background", 2),
        "c": tiny.params("dog", 3),
    }
    engine, events = tiny.engine(branches="rows", max_batch=8), []
    for name, params in wishes.items():
        engine.admit(tiny.job(name, params))
        events += engine.tick()
    results = run(engine, events)
    for name, params in wishes.items():
        assert relative(results[name], tiny.stock(params)) <= 1e-4, name
    assert max(event.batch for event in events if isinstance(event, Stepped)) == 3


def test_an_aborted_request_leaves_nothing_and_the_others_go_on(tiny):
    engine = tiny.engine()
    kept = tiny.params("a red circle", 1)
    engine.admit(tiny.job("kept", kept))
    engine.admit(tiny.job("gone", tiny.params("a cat", 2)))
    events = engine.tick()
    assert engine.metrics()["dit_live_tensors"] > 3
    engine.abort("gone")
    results = run(engine, events)
    assert list(results) == ["kept"]
    assert relative(results["kept"], tiny.stock(kept)) <= 1e-4
    assert engine.metrics()["dit_live_tensors"] == 0
    assert not [event for event in events if event.request_id == "gone" and event.step > 1]


def test_a_non_finite_latent_fails_its_request_with_the_step(tiny):
    engine = tiny.engine()
    job = tiny.job("bad", tiny.params("a cat", 2))
    job.conditions["positive/text"][0, 0, 0] = float("nan")
    engine.admit(job)
    good = tiny.params("a dog", 4)
    engine.admit(tiny.job("good", good))
    events: list = []
    results = run(engine, events)
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert failed.request_id == "bad"
    assert isinstance(failed.error, NonFinite)
    assert "step 1 of 4" in failed.error.message
    assert relative(results["good"], tiny.stock(good)) <= 1e-4


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("positive/text", torch.zeros(1, 5, 7)),
        ("positive/text", torch.zeros(2, 5, 48)),
        ("positive/text", torch.zeros(1, 5, 48, dtype=torch.int64)),
        ("positive/other", torch.zeros(1, 5, 48)),
    ],
)
def test_wrong_conditions_are_refused(tiny, name, tensor):
    params = tiny.params("a cat", 2, guidance=1.0)
    engine = tiny.engine()
    with pytest.raises(InvalidRequest):
        engine.admit(DenoiseJob("x", params, {name: tensor}))
    assert not engine.busy


def test_resolutions_interleave(tiny):
    engine, events = tiny.engine(max_batch=4), []
    for index in range(3):
        engine.admit(tiny.job(f"small-{index}", tiny.params("a cat", index, steps=6)))
    engine.admit(tiny.job("wide", tiny.params("a dog", 9, steps=6, width=128)))
    run(engine, events)
    finished = [event.request_id for event in events if isinstance(event, Finished)]
    first_wide = next(i for i, e in enumerate(events) if e.request_id == "wide")
    last_small = max(i for i, e in enumerate(events) if e.request_id.startswith("small") and isinstance(e, Stepped))
    assert first_wide < last_small
    assert len(finished) == 4
