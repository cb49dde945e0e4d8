"""One denoiser on several GPUs: seconds a step for every layout beside one GPU, in one run.

    python -m benchmarks.layouts --world 2 --layouts ulysses cfg ring tensor pipeline --side 1024

Each layout runs the engine over a mesh of `--world` ranks, one process a GPU, without services in between; the
baseline is the same engine on rank 0 alone. Random weights, guidance by two branches, so a step is two forwards; a
pipeline is for two requests without guidance, beside one GPU that runs both in one batch. Bytes are what a rank sends
in a step.
A rehearsal without GPUs: `--source FOLDER --device cpu --side 64 --no-compile`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.kernel_times import kernel_times
from benchmarks.load import write_result
from dit_svc.engine import DenoiseJob, DitEngine, Stepped
from dit_svc.loading import open_engine
from services.config import EngineSection, ModelSection, ParallelSection, ServiceSection, StageConfig
from services.describe import limits_of, open_model
from services.families import load_family
from services.parallel.collectives import sent_bytes
from services.parallel.degrees import Degrees
from services.parallel.mesh import Mesh
from services.request import GenerationParams, resolve

OPTIONS: dict[str, dict[str, Any]] = {
    "one": {},
    "cfg": {"cfg_parallel_size": 2},
    "ulysses": {"ulysses_degree": 2},
    "ulysses-rows": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "tensor": {"tensor_parallel_size": 2},
    "tensor-sequence": {"tensor_parallel_size": 2, "tensor_sequence_parallel": True},
    "pipeline": {"pipeline_parallel_size": 2},
    "hsdp-ulysses": {"hsdp_shard_size": 2, "ulysses_degree": 2},
    "hsdp": {"hsdp_shard_size": 2},
}
# Those whose launches a graph can hold (`services/features/graphs.py`).
GRAPHS = ("one", "cfg", "ulysses", "ulysses-rows", "ring", "tensor", "pipeline")
# Those whose guidance branches share a forward, however long it is.
ROWS = ("ulysses-rows",)
WARMUP_STEPS = 3
TEXT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Setting:
    """What every layout makes."""

    source: str
    family: str
    preset: str
    device: str
    side_px: int
    height_px: int
    frames: int
    steps: int
    compiled: bool
    graphs: bool
    two_requests: bool
    profiled: bool
    traces: str


def run_rank(rank: int, world: int, rendezvous: str, setting: Setting, layouts: list[str], out: str) -> None:
    """One process: every layout in turn."""
    cuda = setting.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rendezvous, rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for layout in layouts:
        started_s = time.perf_counter()
        with torch.inference_mode():
            figures = measure(setting, layout, rank)
        # GPUs differ by some percent: alone, each has a time of its own, and together they wait for the slowest.
        everybody: list[Any] = [None] * world
        dist.all_gather_object(everybody, figures["step_s"])
        figures["step_s_by_rank"] = everybody
        if rank == 0:
            results[layout] = figures
            Path(out).write_text(json.dumps(results))
            print(f"{layout}: {figures} ({time.perf_counter() - started_s:.0f} s in all)", flush=True)
        torch.compiler.reset()
        # Bound methods make cycles: the last layout's weights must be gone before the next ones come.
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        dist.barrier()
    dist.destroy_process_group()


def measure(setting: Setting, layout: str, rank: int) -> dict[str, Any]:
    """Seconds a step with guidance, and with two requests in flight without."""
    options = OPTIONS[layout]
    section = ParallelSection(**options)
    mesh = Mesh(Degrees.of(section), rank, setting.device) if options else None
    features: dict[str, dict[str, Any]] = {"attention": {}}
    if setting.compiled:
        features["compile"] = {}
    if setting.graphs and layout in GRAPHS:
        features["graphs"] = {}
    config = StageConfig(
        service=ServiceSection(port=0),
        model=ModelSection(
            name="m", source=setting.source, family=setting.family, preset=setting.preset, device=setting.device
        ),
        parallel=section,
        engine=EngineSection(branches="rows" if layout in ROWS else "auto"),
        features=features,
    )
    engine, applied = open_engine(config, mesh)
    figures: dict[str, Any] = {"step_s": seconds_a_step(config, engine, setting, requests=1, guidance=4.0)}
    figures |= {f"sent_{kind}_bytes": float(count) for kind, count in sent_bytes.items()}
    if setting.two_requests and layout in ("one", "pipeline"):
        figures["two_requests_step_s"] = seconds_a_step(config, engine, setting, requests=2, guidance=1.0)
    if setting.profiled:
        trace = f"{setting.traces}/{layout}-{rank}.json.gz" if setting.traces else ""
        figures["kernels"] = kernels(config, engine, setting, trace)
    figures |= applied.metrics()
    if setting.device == "cuda":
        figures["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return figures


def seconds_a_step(
    config: StageConfig, engine: DitEngine, setting: Setting, *, requests: int, guidance: float
) -> float:
    """Median over the steps after the warm-up, of all requests together: wall seconds in which each makes a step."""
    admit(config, engine, setting, requests=requests, guidance=guidance, steps=setting.steps + WARMUP_STEPS)
    moments: list[float] = []
    while engine.busy:
        for event in engine.tick():
            if isinstance(event, Stepped) and event.request_id == f"r{requests - 1}":
                if event.step == WARMUP_STEPS:
                    sent_bytes.clear()
                moments.append(time.perf_counter())
    for kind in sent_bytes:
        sent_bytes[kind] //= setting.steps
    return statistics.median(b - a for a, b in zip(moments[WARMUP_STEPS - 1 :], moments[WARMUP_STEPS:], strict=False))


def kernels(config: StageConfig, engine: DitEngine, setting: Setting, trace: str) -> list[tuple[str, float, int]]:
    """(name, milliseconds, calls) of the kernels of two steps with guidance, the longest first."""
    admit(config, engine, setting, requests=1, guidance=4.0, steps=3)
    engine.tick()
    return kernel_times(partial(run_to_the_end, engine), setting.device, 30, trace)


def run_to_the_end(engine: DitEngine) -> None:
    """Until no request is left."""
    while engine.busy:
        engine.tick()


def admit(
    config: StageConfig, engine: DitEngine, setting: Setting, *, requests: int, guidance: float, steps: int
) -> None:
    """Gives the engine requests r0, r1, ... with the same numbers on every rank."""
    source = open_model(config.model)
    part = load_family(source.family).dit
    wish = GenerationParams(
        model="m",
        prompt="x",
        width=setting.side_px,
        height=setting.height_px or setting.side_px,
        num_frames=setting.frames,
        steps=steps,
        guidance=guidance,
        seed=1,
    )
    params = resolve(wish, limits_of(config, source), seed=0)
    for index in range(requests):
        torch.manual_seed(index)
        conditions = part.example_conditions(engine.model, params, TEXT_TOKENS)
        engine.admit(DenoiseJob(f"r{index}", params, conditions))


def main() -> None:
    """Runs the layouts and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="random:0")
    parser.add_argument("--family", default="qwen_image")
    parser.add_argument("--preset", default="qwen-image")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--layouts", nargs="+", default=["cfg", "ulysses", "ring", "tensor", "pipeline"])
    parser.add_argument("--side", type=int, default=1024, help="width in pixels, and height unless --height is given")
    parser.add_argument("--height", type=int, default=0)
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each run")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--graphs", action="store_true", help=f"CUDA graphs, in {', '.join(GRAPHS)}")
    parser.add_argument("--profile", action="store_true", help="keep the kernels of two steps that take longest")
    parser.add_argument("--traces", default="", help="with --profile: a folder for the timelines, for Perfetto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    random = args.source.startswith("random:")
    setting = Setting(
        source=args.source,
        family=args.family if random else "",
        preset=args.preset if random else "",
        device=args.device,
        side_px=args.side,
        height_px=args.height,
        frames=args.frames,
        steps=args.steps,
        compiled=not args.no_compile,
        graphs=args.graphs,
        two_requests="pipeline" in args.layouts,
        profiled=args.profile,
        traces=args.traces,
    )
    if args.traces:
        Path(args.traces).mkdir(parents=True, exist_ok=True)
    layouts = ["one", *args.layouts]
    with TemporaryDirectory() as folder:
        out = args.json.with_suffix(".part.json") if args.json else Path(folder) / "results.json"
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        spawn: Any = multiprocessing.spawn  # type: ignore[attr-defined]
        spawn(run_rank, (args.world, rendezvous, setting, layouts, str(out)), nprocs=args.world, join=True)
        results = json.loads(out.read_text())
    for layout, figures in results.items():
        for kind in ("step_s", "two_requests_step_s"):
            if kind in figures:
                figures[f"{kind}_speedup"] = results["one"][kind] / figures[kind]
                print(f"{layout:14} {kind:20} {figures[kind]:.4f}, {figures[f'{kind}_speedup']:.2f}x")
    write_result(args.json, "layouts", {"work": setting, "world": args.world, "layouts": results})


if __name__ == "__main__":
    main()
