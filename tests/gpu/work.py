"""What a rank does on a GPU: a tiny model's denoiser, with and without other ranks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from dit_svc.engine import DenoiseJob, Finished
from dit_svc.loading import open_engine
from services.config import EngineSection, ModelSection, ParallelSection, ServiceSection, StageConfig
from services.describe import limits_of, open_model
from services.families import load_family
from services.family import VaeModel
from services.parallel.degrees import Degrees
from services.parallel.mesh import Axis, Mesh
from services.parallel.vae_patch import PatchCodec
from services.request import GenerationParams, resolve
from services.vae_attention import attend_by_products
from services.vae_on_gpu import speed_up
from tests.parallel.vaes import KINDS, latents_of, library_vae, pixels_of

SIDES_PX = (64, 112, 208)
# One that waits for another for good takes a GPU from all tests behind it.
RANKS_S = 150.0


def config_of(folder: Path, dtype: str, parallel: dict[str, Any], features: dict[str, Any]) -> StageConfig:
    return StageConfig(
        service=ServiceSection(port=0),
        model=ModelSection(name="m", source=str(folder), device="cuda", dtype=dtype),
        parallel=ParallelSection(**parallel),
        engine=EngineSection(warmup="compile" in features),
        features=features,
    )


def denoise(config: StageConfig, mesh: Mesh | None, requests: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Random requests, each admitted a tick after the one before; final latents and the features' figures."""
    engine, features = open_engine(config, mesh)
    source = open_model(config.model)
    part, limits = load_family(source.family).dit, limits_of(config, source)
    randomness, waiting, latents = random.Random(3), [], {}
    for index in range(requests):
        wish = GenerationParams(
            model="m",
            prompt="x",
            width=randomness.choice(SIDES_PX),
            height=randomness.choice(SIDES_PX),
            steps=3,
            guidance=randomness.choice([1.0, 4.0]),
            num_frames=min(limits.max_frames, 2 * limits.frame_multiple + 1),
        )
        params = resolve(wish, limits, seed=index)
        torch.manual_seed(index)
        conditions = part.example_conditions(engine.model, params, randomness.randint(3, 60))
        waiting.append(DenoiseJob(f"r{index}", params, conditions))
    while waiting or engine.busy:
        if waiting:
            engine.admit(waiting.pop(0))
        latents |= {e.request_id: e.tensors["latents"] for e in engine.tick() if isinstance(e, Finished)}
    return latents, features.metrics()


def run_rank(rank: int, world: int, rendezvous: str, configs: Sequence[StageConfig], requests: int, out: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", rendezvous, rank=rank, world_size=world)
    # Windows grow with the requests of a small model, as they do at full size.
    with torch.inference_mode(), patch("services.parallel.peer_memory.STEP_BYTES", 2**16):
        made = []
        for config in configs:
            # Shown where a test fails: ranks that wait for each other stop at one of these, slow ones do not.
            began_s = time.monotonic()
            made.append(denoise(config, Mesh(Degrees.of(config.parallel), rank, "cuda"), requests))
            print(f"rank {rank}: {config.parallel}, {time.monotonic() - began_s:.1f} s", flush=True)
    torch.save(made, f"{out}.{rank}")
    dist.destroy_process_group()


def denoise_on(world: int, configs: Sequence[StageConfig], requests: int, folder: Path) -> list[Any]:
    """What every rank makes of each of them."""
    return run_ranks(run_rank, world, folder, configs, requests)


def run_ranks(work: Callable[..., None], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """Runs `work(rank, world, rendezvous, *arguments, out)` on each; none of them is left, whatever happens."""
    rendezvous = folder / "rendezvous"
    # Ranks that came here before may have left theirs, where nobody listens any more.
    rendezvous.unlink(missing_ok=True)
    whole = (world, f"file://{rendezvous}", *arguments, f"{folder}/out")
    ranks = multiprocessing.spawn(work, whole, nprocs=world, join=False)
    end_s = time.monotonic() + RANKS_S
    try:
        while not ranks.join(1.0):
            assert time.monotonic() < end_s, f"the ranks have not ended within {RANKS_S:.0f} s"
    finally:
        for process in ranks.processes:
            process.kill()
    return [torch.load(f"{folder}/out.{rank}") for rank in range(world)]


# Sides in latents and frames: pieces of unequal sizes, rows and columns cut, one after the other larger and smaller.
PICTURES = [(11, 6, 1), (5, 9, 1), (41, 30, 1), (3, 2, 1), (7, 4, 3), (20, 35, 3), (5, 9, 3)]


def work_pictures(kind: str, axis: Axis | None) -> list[torch.Tensor]:
    """A tiny VAE's decodes and encodes in float32, of which one is left after its first chunk."""
    vae, about = library_vae(kind).cuda(), KINDS[kind]
    model = VaeModel(vae, about.codec(vae))
    attend_by_products(vae)
    codec = model.codec if axis is None else PatchCodec(model, about.plan, about.compression, axis)
    speed_up(vae)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    made = []
    for height, width, frames in PICTURES:
        if frames > 1 and not about.clips:
            continue
        made.append(next(codec.decode(latents_of(kind, height, width, frames, batch=2).cuda())))
        made += codec.decode(latents_of(kind, height, width, frames).cuda())
        made.append(codec.encode(pixels_of(kind, height, width, 4 * frames - 3).cuda()))
    return [each.cpu() for each in made]


def run_vae_rank(rank: int, world: int, rendezvous: str, kind: str, out: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", rendezvous, rank=rank, world_size=world)
    with torch.inference_mode(), patch("services.parallel.peer_memory.STEP_BYTES", 2**14):
        made = work_pictures(kind, Mesh(Degrees(patch=world), rank, "cuda")["patch"])
    torch.save(made, f"{out}.{rank}")
    dist.destroy_process_group()


def work_pictures_on(world: int, kind: str, folder: Path) -> list[Any]:
    """What every rank makes of them."""
    return run_ranks(run_vae_rank, world, folder, kind)
