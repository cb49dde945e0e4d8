"""Compiled blocks in a real DiT service never recompile: any size, prompt length, guidance and arrival."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch

from protos import dit_pb2, types_pb2
from services.families import load_family
from services.request import GenerationParams, resolve
from services.tensors import bundle_frames
from services.wire import params_to_proto
from tests.cluster.stage_process import StageProcess, run_call, stage

FAMILY = load_family("qwen_image")
LIMITS = FAMILY.variants["t2i"].limits
TEXT_WIDTH = 48
# Few enough that requests of equal size meet and share a batch.
SIDES = (4, 7, 12, 16)
RECOMPILES = "lightloom_rank_dit_recompiles_total"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    FAMILY.tiny(folder, "t2i", 0)
    return folder


def compiled(tiny: Path, *, warmup: bool = True) -> dict[str, object]:
    """Options of a stage that serves the tiny model with compiled blocks."""
    settings = {"model.source": str(tiny), "features.compile.mode": "default", "engine.warmup": warmup}
    return {"module": "dit_svc", "settings": settings, "max_in_flight": 200, "start_timeout_s": 200.0}


def messages(name: str, randomness: random.Random) -> list[dit_pb2.DenoiseRequest]:
    """A request of random size, steps, guidance and prompt length, with random embeddings."""
    wish = GenerationParams(
        model="fake",
        prompt="a cat",
        width=16 * randomness.choice(SIDES),
        height=16 * randomness.choice(SIDES),
        steps=randomness.randint(2, 4),
        guidance=randomness.choice([1.0, 4.0]),
    )
    params = resolve(wish, LIMITS, seed=randomness.randrange(1000))
    branches = ("positive", "negative") if params.guidance > 1 else ("positive",)
    text = {f"{branch}/text": torch.randn(1, randomness.randint(3, 300), TEXT_WIDTH) for branch in branches}
    start = dit_pb2.DenoiseStart(
        context=types_pb2.RequestContext(request_id=name, fence=1), params=params_to_proto(params), num_bundles=1
    )
    frames = [dit_pb2.DenoiseRequest.FromString(message) for message in bundle_frames(text)]
    return [dit_pb2.DenoiseRequest(start=start), *frames]


async def serve_random(served: StageProcess, count: int) -> int:
    """Sends requests that arrive at random; returns the largest batch that was made of them."""
    randomness = random.Random(7)

    async def one(name: str, work: list[dit_pb2.DenoiseRequest], arrival_s: float) -> int:
        await asyncio.sleep(arrival_s)
        responses = await run_call(served.stub, *work, timeout=120)
        assert responses[-1].usage.busy_s > 0
        return max(response.step.batch for response in responses)

    arrivals_s = [randomness.uniform(0, 0.01 * count) for _ in range(count)]
    jobs = [one(f"r{index}", messages(f"r{index}", randomness), arrivals_s[index]) for index in range(count)]
    largest = max(await asyncio.gather(*jobs))
    # The rank tells its figures once a second at least.
    await asyncio.sleep(1.2)
    return largest


async def test_a_hundred_random_requests_never_recompile(tiny: Path, tmp_path: Path) -> None:
    async with stage(tmp_path, **compiled(tiny)) as served:
        by_name = {feature.name: feature for feature in (await served.describe()).features}
        assert set(by_name) == {"attention", "compile"}
        feature = by_name["compile"]
        assert (feature.name, feature.config, feature.exact) == ("compile", '{"mode": "default"}', False)
        assert await serve_random(served, 100) > 2
        assert await served.figure("lightloom_rank_dit_steps_total") >= 200
        assert await served.figure(RECOMPILES) == 0
        assert await served.figure("lightloom_rank_dit_live_tensors") == 0


async def test_the_counter_sees_what_the_warm_up_left_out(tiny: Path, tmp_path: Path) -> None:
    async with stage(tmp_path, **compiled(tiny, warmup=False)) as served:
        await serve_random(served, 5)
        assert await served.figure(RECOMPILES) >= 5
