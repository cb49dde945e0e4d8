"""VAEs at full size on one GPU and two: diffusers' eager decode and ours, on the same random weights, in the same run.

    python -m benchmarks.vae --json benchmarks/results/vae_h100.json            # one GPU, every case and candidate
    python -m benchmarks.vae --world 2 --only wan                               # and the same over two

A candidate is a set of options; "service" is what the service does. Each must give the baseline's frames (`apart_fp32`:
largest difference over largest value, at a small size in float32). A line is printed as soon as it is measured; a case
that fails is kept with its error. Rehearsal without a GPU: `--device cpu`, with tiny models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

from benchmarks.load import write_result
from services.causal_stream import CausalCodec, _convolve_in_time
from services.families import load_family
from services.family import VaeModel
from services.parallel.degrees import Degrees
from services.parallel.mesh import Axis, Mesh
from services.parallel.vae_patch import PatchCodec
from services.vae_on_gpu import channels_last, speed_up
from services.weights import ModelSource, open_source

SMALL_PX = (192, 128)
SMALL_FRAMES = 9


@dataclass(frozen=True)
class Case:
    """A preset's VAE and what it decodes: sides in pixels, frames of the clip."""

    family: str
    preset: str
    variant: str
    sides: tuple[int, int]
    frames: int = 1


CASES = {
    "wan": Case("wan", "wan2.2-t2v-a14b", "t2v", (480, 832), 81),
    "wan22": Case("wan", "wan2.2-ti2v-5b", "ti2v", (704, 1280), 121),
    "qwen": Case("qwen_image", "qwen-image", "t2i", (1024, 1024)),
    "flux": Case("flux", "flux1-dev", "dev", (1024, 1024)),
}
DEFAULT_CASES = ("wan", "qwen", "flux")


@dataclass(frozen=True)
class Candidate:
    """What is done to a loaded VAE.

    Attributes:
        layout: weights channels last. fused: norms with their SiLU, and all else that the service does on a GPU.
        compiled: the whole decoder, for each shape.
        step: latent frames decoded at once. conv3d: convolutions in time as such.
        tuned: cuDNN tries its algorithms.
    """

    layout: bool = True
    fused: bool = True
    compiled: bool = False
    step: int = 1
    conv3d: bool = False
    tuned: bool = False


CANDIDATES = {
    "plain": Candidate(layout=False, fused=False),
    "channels_last": Candidate(fused=False),
    "service": Candidate(),
    "tuned": Candidate(tuned=True),
    "step2": Candidate(step=2),
    "step4": Candidate(step=4),
    "conv3d": Candidate(conv3d=True),
    "conv3d_tuned": Candidate(conv3d=True, tuned=True),
    "compiled": Candidate(compiled=True),
    "compiled_tuned": Candidate(compiled=True, tuned=True),
}
CLIPS_ONLY = ("step2", "step4", "conv3d", "conv3d_tuned")
RANKS = ("service", "tuned")


@dataclass(frozen=True)
class Bench:
    """Where and how often."""

    device: torch.device
    runs: int
    folder: Path

    def source(self, case: Case) -> ModelSource:
        """Full size on a GPU, tiny on the CPU."""
        if self.device.type == "cuda":
            return open_source("random:0", family=case.family, preset=case.preset)
        folder = self.folder / case.variant
        if not folder.exists():
            load_family(case.family).tiny(folder, case.variant, 0)
        return open_source(str(folder))

    def latents(self, case: Case, dtype: torch.dtype, *, small: bool = False) -> torch.Tensor:
        """Noise, the same for everybody."""
        part = load_family(case.family).vae
        model = part.load(self.source(case).without_weights(), torch.device("meta"), dtype)
        channels, compression, frames_each = part.latent_geometry(model)
        sides, frames = case.sides, case.frames
        if small or self.device.type == "cpu":
            sides, frames = SMALL_PX, min(case.frames, SMALL_FRAMES)
        inner = ((frames - 1) // frames_each + 1,) if frames_each > 1 else ()
        shape = (1, channels, *inner, *(side // compression for side in sides))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise.to(self.device, dtype)

    def sync(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def prepared(bench: Bench, case: Case, candidate: Candidate, dtype: torch.dtype, axis: Axis | None = None) -> VaeModel:
    """A freshly loaded VAE with the candidate's options; over an axis, pictures are shared exactly."""
    part = load_family(case.family).vae
    model = part.load(bench.source(case), bench.device, dtype)
    if isinstance(model.codec, CausalCodec):
        if candidate.step > 1:
            model.codec._frames_a_step = candidate.step
        if candidate.conv3d:
            _in_3d(model.module)
    if axis is not None:
        model = VaeModel(model.module, PatchCodec(model, part.plan, part.latent_geometry(model)[1], axis))
    if candidate.fused:
        speed_up(model.module)
    elif candidate.layout:
        channels_last(model.module)
    if candidate.compiled:
        decoder: Any = model.module.decoder
        decoder.forward = torch.compile(decoder.forward, dynamic=False)
    torch.backends.cudnn.benchmark = candidate.tuned
    return model


def baseline(
    bench: Bench, case: Case, dtype: torch.dtype, *, small: bool = False
) -> tuple[dict[str, Any], torch.Tensor]:
    """The library's class, untouched: figures and frames."""
    part = load_family(case.family).vae
    cls = type(part.load(bench.source(case).without_weights(), torch.device("meta"), dtype).module)
    library: Any = bench.source(case).load(cls, "vae", bench.device, dtype)
    torch.backends.cudnn.benchmark = False
    latents = bench.latents(case, dtype, small=small)
    facts, frames = timed(bench, lambda: iter([library.decode(latents).sample]), runs=1 if small else bench.runs)
    return facts, frames[0]


def timed(
    bench: Bench, chunks: Callable[[], Iterator[torch.Tensor]], runs: int = 0
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Median milliseconds of a decode and to its first chunk, and the frames."""
    started_s = time.perf_counter()
    frames = [chunk.clamp(-1, 1) for chunk in chunks()]
    bench.sync()
    facts: dict[str, Any] = {"first_run_s": time.perf_counter() - started_s}
    whole_ms, first_ms = [], []
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(runs or bench.runs):
        bench.sync()
        started_s = time.perf_counter()
        for index, _chunk in enumerate(chunks()):
            if not index:
                bench.sync()
                first_ms.append(1e3 * (time.perf_counter() - started_s))
        bench.sync()
        whole_ms.append(1e3 * (time.perf_counter() - started_s))
    if bench.device.type == "cuda":
        facts["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return facts | {"ms": statistics.median(whole_ms), "first_ms": statistics.median(first_ms)}, frames


def apart(ours: list[torch.Tensor], theirs: torch.Tensor) -> float:
    """Largest difference over largest value."""
    joined = torch.cat(ours, dim=2) if theirs.ndim == 5 else ours[0]
    return float((joined.clamp(-1, 1) - theirs).abs().max() / theirs.abs().max())


def run_case(bench: Bench, name: str, wanted: list[str], say: Callable[[dict[str, Any]], None]) -> None:
    """The baseline and every candidate of a case."""
    case, dtype = CASES[name], torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    expected_small = baseline(bench, case, torch.float32, small=True)[1]
    facts, expected = baseline(bench, case, dtype)
    say({"case": name, "candidate": "diffusers", **facts})
    small, latents = (bench.latents(case, kind, small=each) for kind, each in ((torch.float32, True), (dtype, False)))
    for candidate in wanted:
        if case.frames == 1 and candidate in CLIPS_ONLY:
            continue
        row: dict[str, Any] = {"case": name, "candidate": candidate}
        try:
            options = CANDIDATES[candidate]
            exact = prepared(bench, case, options, torch.float32)
            row["apart_fp32"] = apart(list(exact.codec.decode(small)), expected_small)
            del exact
            ours = prepared(bench, case, options, dtype)
            facts, frames = timed(bench, partial(ours.codec.decode, latents))
            row |= facts | {"apart": apart(frames, expected), "speedup": _ratio(say, facts["ms"])}
            row["first_share"] = facts["first_ms"] / facts["ms"]
            del ours, frames
        except Exception as error:  # noqa: BLE001 - the others are measured
            row |= {"error": f"{type(error).__name__}: {error}"[:1500], "trace": traceback.format_exc()[-1500:]}
        say(row)
        torch.compiler.reset()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _ratio(say: Any, ms: float) -> float:
    rows = [row for row in say.__self__.rows if row["candidate"] == "diffusers"]
    return float(rows[-1]["ms"] / ms)


class Notes:
    """Rows of figures, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """One more."""
        self.rows.append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "trace"}), flush=True)


# ---- Convolutions in time as the library has them -------------------------------------------------------------------


def _in_3d(vae: nn.Module) -> None:
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            layer: Any = module
            layer.forward = MethodType(_convolve_in_time, module)


# ---- Several ranks --------------------------------------------------------------------------------------------------


def run_rank(rank: int, world: int, rendezvous: str, device: str, runs: int, cases: list[str], out: str) -> None:
    """One process: every case alone on rank 0, then over all ranks."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    bench = Bench(torch.device(device, rank) if device == "cuda" else torch.device("cpu"), runs, Path(out).parent)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world)
    axis = Mesh(Degrees(patch=world), rank, device)["patch"]
    notes = Notes()
    with torch.inference_mode():
        for name in cases:
            for candidate in RANKS:
                row = _over_ranks(bench, name, candidate, axis)
                if not rank:
                    notes.add(row)
    if not rank:
        Path(out).write_text(json.dumps(notes.rows))
    dist.destroy_process_group()


def _over_ranks(bench: Bench, name: str, candidate: str, axis: Axis) -> dict[str, Any]:
    """One GPU and all of them, by the same options; every rank measures both, so that none waits for long."""
    case, options = CASES[name], CANDIDATES[candidate]
    row: dict[str, Any] = {"case": name, "candidate": candidate, "ranks": axis.size}
    small = bench.latents(case, torch.float32, small=True)
    expected = list(prepared(bench, case, options, torch.float32).codec.decode(small))
    got = list(prepared(bench, case, options, torch.float32, axis).codec.decode(small))
    row["apart_fp32"] = max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in zip(got, expected, strict=True)
    )
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    latents = bench.latents(case, dtype)
    alone = prepared(bench, case, options, dtype)
    single, frames = timed(bench, partial(alone.codec.decode, latents))
    shared = prepared(bench, case, options, dtype, axis)
    several, shared_frames = timed(bench, partial(shared.codec.decode, latents))
    row["apart"] = max(float((a - b).abs().max()) for a, b in zip(shared_frames, frames, strict=True))
    return row | {"one": single, "all": several, "speedup": single["ms"] / several["ms"]}


def main() -> None:
    """Prints a line for each case and candidate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(DEFAULT_CASES), help="cases")
    parser.add_argument("--candidates", nargs="*", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--world", type=int, default=1, help="ranks, each with a GPU; 1: every candidate on one GPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device_name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    with TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        if args.world > 1:
            given = (args.world, f"file://{folder}/rendezvous", args.device, args.runs, args.only, str(out))
            spawn: Any = multiprocessing.spawn  # type: ignore[attr-defined]
            spawn(run_rank, given, nprocs=args.world, join=True)
            rows = json.loads(out.read_text())
        else:
            notes = Notes()
            bench = Bench(torch.device(args.device), args.runs, Path(folder))
            with torch.inference_mode():
                for name in args.only:
                    try:
                        run_case(bench, name, args.candidates, notes.add)
                    except Exception as error:  # noqa: BLE001 - the other cases are measured
                        notes.add({"case": name, "candidate": "diffusers", "error": f"{type(error).__name__}: {error}"})
            rows = notes.rows
    facts = {"device": device_name, "torch": torch.__version__, "ranks": args.world, "rows": rows}
    write_result(args.json, "vae", facts)


if __name__ == "__main__":
    main()
