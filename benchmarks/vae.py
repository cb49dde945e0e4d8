"""VAEs at full size on one GPU and two: diffusers' eager decode and ours, on the same random weights, in the same run.

    python -m benchmarks.vae --json benchmarks/results/vae_h100.json            # one GPU, every case and candidate
    python -m benchmarks.vae --world 2 --only wan                               # and the same over two
    python -m benchmarks.vae --world 2 --only wan --profile                     # and where the time goes

A candidate is a set of options; "service" is what the service does. Each must give the baseline's frames (`apart_fp32`:
largest difference over largest value, at a small size in float32). A line is printed as soon as it is measured; a case
that fails is kept with its error. Rehearsal without a GPU: `--device cpu`, with tiny models.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.kernel_times import kernel_times
from benchmarks.load import write_result
from services.causal_stream import CausalCodec
from services.families import load_family
from services.family import VaeModel
from services.parallel.degrees import Degrees
from services.parallel.mesh import Axis, Mesh
from services.parallel.vae_patch import PatchCodec
from services.vae_attention import attend_by_products
from services.vae_on_gpu import channels_last, compile_decoder, speed_up
from services.weights import ModelSource, open_source

Figures = dict[str, Any]

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
        step: latent frames decoded at once.
        tuned: cuDNN tries its algorithms.
    """

    layout: bool = True
    fused: bool = True
    compiled: bool = False
    step: int = 1
    tuned: bool = False


CANDIDATES = {
    "plain": Candidate(layout=False, fused=False),
    "channels_last": Candidate(fused=False),
    "service": Candidate(),
    "tuned": Candidate(tuned=True),
    "step2": Candidate(step=2),
    "step4": Candidate(step=4),
    "compiled": Candidate(compiled=True),
    "compiled_step2": Candidate(compiled=True, step=2),
}
CLIPS_ONLY = ("step2", "step4", "compiled_step2")
RANKS = ("service", "tuned")
ROWS = "rows.json"


class Bench:
    """Where and how often; weights are drawn once for each case and dtype.

    Args:
        folder: for the tiny models of a run without a GPU, this process's own.
        profiled: kernels of what ranks share are noted too.
    """

    def __init__(self, device: torch.device, runs: int, folder: Path, *, profiled: bool = False) -> None:
        self.device, self.runs, self.profiled = device, runs, profiled
        self._folder = folder
        self._untouched: dict[tuple[Case, torch.dtype], Any] = {}

    @property
    def dtype(self) -> torch.dtype:
        """What a service would take."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def outline(self, case: Case) -> VaeModel:
        """The model without weights."""
        source = self._source(case).without_weights()
        return load_family(case.family).vae.load(source, torch.device("meta"), torch.float32)

    def stock(self, case: Case, dtype: torch.dtype) -> Any:
        """The library's VAE, untouched."""
        key = (case, dtype)
        if key not in self._untouched:
            cls = type(self.outline(case).module)
            self._untouched[key] = self._source(case).load(cls, "vae", self.device, dtype)
        return self._untouched[key]

    def latents(self, case: Case, dtype: torch.dtype, *, small: bool = False) -> torch.Tensor:
        """Noise, the same for everybody."""
        channels, compression, frames_each = load_family(case.family).vae.latent_geometry(self.outline(case))
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

    def _source(self, case: Case) -> ModelSource:
        """Full size on a GPU, tiny on the CPU."""
        if self.device.type == "cuda":
            return open_source("random:0", family=case.family, preset=case.preset)
        folder = self._folder / case.variant
        if not folder.exists():
            load_family(case.family).tiny(folder, case.variant, 0)
        return open_source(str(folder))


def prepared(bench: Bench, case: Case, candidate: Candidate, dtype: torch.dtype, axis: Axis | None = None) -> VaeModel:
    """A VAE with the candidate's options; over an axis, pictures are shared exactly."""
    part, outline = load_family(case.family).vae, bench.outline(case)
    vae = copy.deepcopy(bench.stock(case, dtype))
    model = VaeModel(vae, type(outline.codec)(vae))  # type: ignore[call-arg]
    if isinstance(model.codec, CausalCodec):
        model.codec._frames_a_step = candidate.step
    if candidate.fused:
        attend_by_products(vae)
    if axis is not None:
        model = VaeModel(vae, PatchCodec(model, part.plan, part.latent_geometry(outline)[1], axis))
    if candidate.fused:
        speed_up(vae)
    elif candidate.layout:
        channels_last(vae)
    if candidate.compiled:
        compile_decoder(vae)
    torch.backends.cudnn.benchmark = candidate.tuned
    return model


def baseline(bench: Bench, case: Case, dtype: torch.dtype, *, small: bool = False) -> tuple[Figures, torch.Tensor]:
    """The library's eager decode: figures and frames."""
    library, latents = bench.stock(case, dtype), bench.latents(case, dtype, small=small)
    torch.backends.cudnn.benchmark = False
    facts, frames = timed(bench, lambda: iter([library.decode(latents).sample]), runs=1 if small else bench.runs)
    return facts, frames[0]


def timed(
    bench: Bench, chunks: Callable[[], Iterator[torch.Tensor]], runs: int = 0
) -> tuple[Figures, list[torch.Tensor]]:
    """Median milliseconds of a decode and to its first chunk, and the frames."""
    started_s = time.perf_counter()
    frames = [chunk.clamp(-1, 1) for chunk in chunks()]
    bench.sync()
    facts: Figures = {"first_run_s": time.perf_counter() - started_s}
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


def run_cases(bench: Bench, names: list[str], wanted: list[str], limit_s: float, notes: Notes) -> None:
    """The baselines, then every candidate of every case, until the time is up."""
    end_s = time.monotonic() + limit_s
    expected: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
    for name in names:
        with notes.kept({"case": name, "candidate": "diffusers"}) as row:
            small = baseline(bench, CASES[name], torch.float32, small=True)[1]
            facts, whole = baseline(bench, CASES[name], bench.dtype)
            row |= facts
            expected[name] = (small, whole, facts["ms"])
    for candidate, name in product(wanted, expected):
        if CASES[name].frames == 1 and candidate in CLIPS_ONLY:
            continue
        with notes.kept({"case": name, "candidate": candidate}) as row:
            if time.monotonic() > end_s:
                raise TimeoutError(f"not run: {limit_s:.0f} s are over")
            row |= run_candidate(bench, CASES[name], CANDIDATES[candidate], *expected[name])
        if CANDIDATES[candidate].compiled:
            torch.compiler.reset()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def run_candidate(
    bench: Bench, case: Case, options: Candidate, small: torch.Tensor, whole: torch.Tensor, stock_ms: float
) -> Figures:
    """Figures, and how far its frames are from the baseline's."""
    row: Figures = {}
    if not options.compiled:
        # A graph for each shape and dtype takes a while: what is compiled is compared at full size only.
        exact = prepared(bench, case, options, torch.float32)
        row["apart_fp32"] = apart(list(exact.codec.decode(bench.latents(case, torch.float32, small=True))), small)
        del exact
    ours = prepared(bench, case, options, bench.dtype)
    facts, frames = timed(bench, partial(ours.codec.decode, bench.latents(case, bench.dtype)))
    row |= facts | {"apart": apart(frames, whole), "speedup": stock_ms / facts["ms"]}
    return row | {"first_share": facts["first_ms"] / facts["ms"]}


class Notes:
    """Rows of figures, printed as they come."""

    def __init__(self, *, silent: bool = False) -> None:
        self.rows: list[Figures] = []
        self._silent = silent

    @contextmanager
    def kept(self, row: Figures) -> Iterator[Figures]:
        """One more, filled in inside; what goes wrong there is kept in its place."""
        try:
            yield row
        except Exception as error:  # noqa: BLE001 - the others are measured
            row |= {"error": f"{type(error).__name__}: {error}"[:1500], "trace": traceback.format_exc()[-1500:]}
        self.rows.append(row)
        if not self._silent:
            print(json.dumps({key: value for key, value in row.items() if key != "trace"}), flush=True)


# ---- Several ranks --------------------------------------------------------------------------------------------------


def run_rank(rank: int, args: argparse.Namespace, folder: str) -> None:
    """One process: every case alone on rank 0, then over all ranks."""
    device, world = args.device, args.world
    if device == "cuda":
        torch.cuda.set_device(rank)
    own = Path(folder) / str(rank)
    where = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    bench = Bench(where, args.runs, own, profiled=args.profile)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.backends.cudnn.allow_tf32 = False
    axis = Mesh(Degrees(patch=world), rank, device)["patch"]
    notes = Notes(silent=rank > 0)
    with torch.inference_mode():
        for name, candidate in product(args.only, RANKS):
            with notes.kept({"case": name, "candidate": candidate, "ranks": world}) as row:
                row |= over_ranks(bench, CASES[name], CANDIDATES[candidate], axis)
            if not rank:
                (Path(folder) / ROWS).write_text(json.dumps(notes.rows))
    dist.destroy_process_group()


def over_ranks(bench: Bench, case: Case, options: Candidate, axis: Axis) -> Figures:
    """One GPU and all of them, by the same options; every rank measures both, so that none waits for long."""
    small = bench.latents(case, torch.float32, small=True)
    expected = list(prepared(bench, case, options, torch.float32).codec.decode(small))
    got = list(prepared(bench, case, options, torch.float32, axis).codec.decode(small))
    latents = bench.latents(case, bench.dtype)
    alone = prepared(bench, case, options, bench.dtype)
    single, frames = timed(bench, partial(alone.codec.decode, latents))
    shared = prepared(bench, case, options, bench.dtype, axis)
    several, shared_frames = timed(bench, partial(shared.codec.decode, latents))
    figures: Figures = {
        "apart_fp32": max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)),
        "apart": max(float((a - b).abs().max()) for a, b in zip(shared_frames, frames, strict=True)),
        "one": single,
        "all": several,
        "speedup": single["ms"] / several["ms"],
    }
    if bench.profiled:
        whole = partial(decode_all, bench, partial(shared.codec.decode, latents))
        figures["kernels"] = kernel_times(whole, bench.device.type, 20)
    return figures


def decode_all(bench: Bench, chunks: Callable[[], Iterator[torch.Tensor]]) -> None:
    """To the last frame."""
    for _ in chunks():
        """A chunk is taken and gone."""
    bench.sync()


def main() -> None:
    """Prints a line for each case and candidate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(DEFAULT_CASES), help="cases")
    parser.add_argument("--candidates", nargs="*", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--limit-s", type=float, default=210.0, help="no candidate begins later")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--world", type=int, default=1, help="ranks, each with a GPU; 1: every candidate on one GPU")
    parser.add_argument("--profile", action="store_true", help="with --world: also the kernels that take longest")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # What is compared in float32 is to be float32.
    torch.backends.cudnn.allow_tf32 = False
    device_name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    with TemporaryDirectory() as folder:
        out = Path(folder) / ROWS
        notes = Notes()
        if args.world > 1:
            spawn: Any = multiprocessing.spawn  # type: ignore[attr-defined]
            with notes.kept({"case": "all", "ranks": args.world}):
                spawn(run_rank, (args, folder), nprocs=args.world, join=True)
            rows = [*(json.loads(out.read_text()) if out.exists() else ()), *notes.rows]
        else:
            bench = Bench(torch.device(args.device), args.runs, Path(folder))
            with torch.inference_mode():
                run_cases(bench, args.only, args.candidates, args.limit_s, notes)
            rows = notes.rows
    facts = {"device": device_name, "torch": torch.__version__, "ranks": args.world, "rows": rows}
    write_result(args.json, "vae", facts)


if __name__ == "__main__":
    main()
