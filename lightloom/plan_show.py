"""`lightloom plan` as a command: a wish to a job, and the layouts as a table."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers.utils import logging
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dit_svc.loading import with_expert
from lightloom.plan import DTYPE, Job, Layout, Planner
from lightloom.plan_rates import Rates
from lightloom.plan_wish import GIB, Wish, parse_memory
from services.families import load_family
from services.request import GenerationParams, resolve
from services.weights import open_source

SHOWN = 12
NOTABLY = 0.97
# A pipe has no width of its own; the longest row needs about this many characters.
WIDE_CHARS = 240
DEFAULT_MEMORY_BYTES = 80 * GIB
# Where no bar can be drawn, a line says how far it is.
TOLD_EVERY_S = 10.0


def job_of(wish: Wish) -> Job:
    """Opened and checked.

    Raises:
        StartupError: a value that cannot be read, or a model that is not there.
        InvalidRequest: a size, number of frames or guidance that the model does not allow.
    """
    wish.check()
    source = open_source(wish.model, family=wish.family, preset=wish.preset)
    family = load_family(source.family)
    source = with_expert(source, family.dit, wish.expert)
    width, _, height = wish.size.partition("x")
    generation = GenerationParams(
        model="plan",
        prompt="plan",
        width=int(width) if wish.size else None,
        height=int(height) if wish.size else None,
        num_frames=wish.frames,
        guidance=wish.guidance,
    )
    limits = family.variants[source.variant].limits
    # Input pictures come as latents; the dry run makes some.
    params = resolve(generation, limits.without_inputs(), seed=0)
    memory_bytes = parse_memory(wish.memory) if wish.memory else _own_memory()
    return Job(source, params, wish.gpus, memory_bytes, wish.text_tokens, wish.offload_experts)


def _own_memory() -> int:
    """Bytes of this machine's first GPU, or 80 GiB."""
    if not torch.cuda.is_available():
        return DEFAULT_MEMORY_BYTES
    return torch.cuda.get_device_properties(0).total_memory


def show_plan(wish: Wish, rates: Rates, *, everything: bool) -> None:
    """Plans and prints; how far it is goes to stderr.

    Args:
        everything: all layouts, not only the first of those that fit and of those that do not.

    Raises:
        StartupError, InvalidRequest: what was asked for cannot be planned.
    """
    logging.set_verbosity_error()
    job, errors = job_of(wish), Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("layouts", total=None)
        told_s = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal told_s
            bar.update(task, completed=done, total=total)
            if not errors.is_terminal and time.monotonic() - told_s > TOLD_EVERY_S:
                errors.print(f"{done} of {total} layouts", highlight=False)
                told_s = time.monotonic()

        layouts = Planner(job, rates).layouts(tell)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDE_CHARS)
    show_layouts(console, job, rates, layouts, everything=everything)


def show_layouts(console: Console, job: Job, rates: Rates, layouts: Sequence[Layout], *, everything: bool) -> None:
    """The job, the table, and the section for a config that is expected to be the fastest."""
    fitting = [layout for layout in layouts if not layout.refusal]
    refused = [layout for layout in layouts if layout.refusal]
    whole = [layout for layout in fitting if not _sharded_in_vain(layout, fitting)]
    console.print(_heading(job, rates), highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("layout", overflow="fold")
    host = ("host GiB",) if job.offload_experts else ()
    for title in (
        "weights GiB",
        *host,
        "activations GiB",
        "windows GiB",
        "sent MB a step",
        "ms a step",
        "ms when busy",
    ):
        table.add_column(title, justify="right", overflow="fold")
    table.add_column("", overflow="fold")
    shown = [*fitting, *refused] if everything else [*whole[:SHOWN], *refused[:SHOWN]]
    for layout in shown:
        first = bool(fitting) and layout is fitting[0]
        table.add_row(*_row(layout, host=job.offload_experts), layout.refusal or ("fits, fastest" if first else "fits"))
    console.print(table)
    if hidden := len(layouts) - len(shown):
        more = "1 more layout: --all shows it" if hidden == 1 else f"{hidden} more layouts: --all shows them"
        console.print(more, style="dim", highlight=False)
    console.print(_verdict(job, fitting), highlight=False, markup=False)


def _heading(job: Job, rates: Rates) -> str:
    params, dtype = job.params, str(DTYPE).removeprefix("torch.")
    frames = f", {params.num_frames} frames" if params.num_frames > 1 else ""
    offloaded = (
        "One expert at a time is on a GPU, all are in pinned memory of the host, for each rank; what a swap takes is "
        "not counted.\n"
        if job.offload_experts
        else ""
    )
    only = f", its expert {job.source.expert} alone" if job.source.expert else ""
    return (
        f"{job.source.spec} ({job.source.family} {job.source.variant}){only}, {dtype}; one request of"
        f" {params.width}x{params.height}{frames}, guidance {params.guidance:g},"
        f" {job.text_tokens} text tokens where their number is free\n"
        f"{_gpus(job, rates)}\n"
        f"{offloaded}"
        "Times are estimates: arithmetic on a dry run and on rates of GPUs and links. Nothing has been run on a GPU.\n"
    )


def _gpus(job: Job, rates: Rates) -> str:
    memory, reserve = f"{job.memory_bytes / GIB:.1f} GiB", f"{rates.reserve_gib:g} GiB"
    if job.gpus == 1:
        return f"1 GPU of {memory}, {reserve} of it reserved"
    of_whom = "the denoiser's, of the rank with the most"
    return f"{job.gpus} GPUs of {memory}, {reserve} of each reserved; bytes are {of_whom}"


def _sharded_in_vain(layout: Layout, fitting: Sequence[Layout]) -> bool:
    """Whether the same layout fits without HSDP, or with fewer shards."""
    mine = layout.section
    return any(
        replace(other.section, hsdp_shard_size=mine.hsdp_shard_size, hsdp_replicate_size=mine.hsdp_replicate_size)
        == mine
        and other.section.hsdp_shard_size < mine.hsdp_shard_size
        for other in fitting
    )


def _row(layout: Layout, *, host: bool = False) -> tuple[str, ...]:
    keys = ", ".join(f"{key} {json.dumps(value)}" for key, value in layout.keys.items()) or "one rank"
    figures = (
        (layout.weight_bytes / GIB, "{:.2f}"),
        *([(layout.host_bytes / GIB, "{:.2f}")] if host else []),
        (layout.activation_bytes / GIB, "{:.2f}"),
        (layout.window_bytes / GIB, "{:.2f}"),
        (layout.sent_bytes / 1e6, "{:.0f}"),
        (layout.step_s * 1e3, _digits(layout.step_s)),
        (layout.busy_s * 1e3, _digits(layout.busy_s)),
    )
    known = layout.activation_bytes > 0
    return keys, *(form.format(value) if value or known else "-" for value, form in figures)


def _digits(seconds: float) -> str:
    """How milliseconds are written: an estimate has no more than three digits."""
    return "{:.2f}" if seconds < 0.01 else "{:.1f}" if seconds < 0.1 else "{:.0f}"


def _verdict(job: Job, fitting: Sequence[Layout]) -> str:
    if not fitting:
        return "\nNo layout fits: take more GPUs, GPUs with more memory, or a smaller size."
    first = fitting[0]
    lines = [f"{key} = {json.dumps(value)}" for key, value in first.keys.items()]
    section = "\n".join(("[parallel]", *lines)) if lines else "no [parallel] section"
    if job.offload_experts:
        section += "\n\n[engine]\noffload_experts = true"
    steps = job.params.steps
    text = f"\nExpected to be fastest, {first.step_s * steps:.2f} s for {steps} steps:\n\n{section}"
    busiest = min(fitting, key=lambda layout: layout.busy_s)
    if busiest.busy_s < NOTABLY * first.busy_s:
        keys, *_, busy_ms = _row(busiest)
        text += f"\n\nWith enough requests to keep all ranks busy: {keys}, {busy_ms} ms a step."
    return text
