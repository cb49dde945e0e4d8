"""`lightloom plan`: which layouts of a denoiser fit on so many GPUs, and which is expected to be fastest.

Every layout goes through a dry run of its ranks (`dit_svc/dry_run.py`); times are arithmetic on what it counts and on
rates (`plan_rates.py`). Nothing is run on a GPU.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch

from dit_svc.dry_run import DryRun, Step
from dit_svc.idle_experts import WITH_HSDP
from lightloom.plan_rates import Rates
from lightloom.plan_wish import GIB
from services.config import ParallelSection
from services.errors import StartupError
from services.family import DitModel, Tensors
from services.parallel.degrees import Degrees
from services.request import ResolvedParams
from services.weights import ModelSource

DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Job:
    """What the GPUs are to do: one request of that shape, on so many of them, each with `memory_bytes`.

    `offload_experts` is that of the engine: of several experts, one at a time is on a GPU.
    """

    source: ModelSource
    params: ResolvedParams
    gpus: int
    memory_bytes: int
    text_tokens: int
    offload_experts: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout, and what was found of it. Bytes are those of the rank with the most.

    Attributes:
        section: the degrees as a config has them.
        weight_bytes: held in a forward; 0 where the model refuses the degrees.
        activation_bytes, window_bytes, sent_bytes: of one step of one request; 0 where the weights alone are too much.
            Windows are where ranks read each other's memory.
        host_bytes: of pinned memory of the host, for each rank.
        step_s: seconds a step takes when the request is alone; busy_s: when enough others fill a pipeline.
        refusal: why it cannot be used; empty where it can.
    """

    section: ParallelSection
    weight_bytes: int = 0
    activation_bytes: int = 0
    window_bytes: int = 0
    sent_bytes: int = 0
    host_bytes: int = 0
    step_s: float = 0.0
    busy_s: float = 0.0
    refusal: str = ""

    @property
    def keys(self) -> dict[str, int | bool]:
        """What the config's [parallel] section has to say."""
        default = ParallelSection()
        given = {field.name: getattr(self.section, field.name) for field in fields(self.section)}
        return {key: value for key, value in given.items() if value != getattr(default, key)}


class Planner:
    """Finds out about layouts, one after the other.

    Raises:
        StartupError: experts are to be offloaded, and there is one only.
    """

    def __init__(self, job: Job, rates: Rates) -> None:
        self._job = job
        self._rates = rates
        alone = DryRun(job.source, Degrees(), 0, DTYPE)
        self._conditions = alone.example(job.params, job.text_tokens)
        self._tokens = alone.part.token_count(alone.model, job.params)
        self._branches = alone.branches(job.params, self._conditions)
        self._experts = bool(alone.part.plan.experts)
        if job.offload_experts:
            alone.offloaded_weights()
        # The dry runs of the last layout: those that differ in HSDP alone share them.
        self._known: tuple[Degrees, list[RankRun]] = (Degrees(), [RankRun(alone)])
        # What ranks hold, by tensor and pipeline degree and place: a copy is sooner made than another.
        self._models: dict[tuple[int, int, int], DitModel] = {}

    def layouts(self, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Layout]:
        """All layouts: those that fit first, the fastest at the top; of those about as fast, who sends least.

        Args:
            progress: is told how many are done, and of how many.
        """
        sections = list(sections_of(self._job.gpus, self._branches, self._experts))
        found = []
        for done, section in enumerate(sections):
            progress(done, len(sections))
            found.append(self._layout(section))
        return sorted(found, key=_order)

    def _layout(self, section: ParallelSection) -> Layout:
        shards = section.hsdp_shard_size
        try:
            runs = self._runs(Degrees.of(section))
        except StartupError as error:
            return Layout(section, refusal=str(error).removeprefix("parallel."))
        if self._job.offload_experts:
            if Degrees.of(section).hsdp:
                return Layout(section, refusal=WITH_HSDP)
            held = [run.dry.offloaded_weights() for run in runs]
        else:
            held = [run.dry.weights(shards) for run in runs]
        weights, host = max(rank.peak for rank in held), max(rank.host for rank in held)
        if self._missing(weights):
            refusal = f"weights and reserve need {self._need(weights):.1f} GiB"
            return Layout(section, weights, host_bytes=host, refusal=refusal)
        steps = [run.step(self._job.params, self._conditions) for run in runs]
        activations = max(step.activation_bytes for step in steps)
        windows = max(step.window_bytes for step in steps)
        gathered = [run.dry.gathered(shards, step) for run, step in zip(runs, steps, strict=True)]
        sent = [sum(step.sent_bytes.values()) + count for step, (count, _) in zip(steps, gathered, strict=True)]
        passes = steps[0].passes
        a_pass_s = max(self._rank_s(step, *sent) for step, sent in zip(steps, gathered, strict=True)) / passes
        layout = Layout(
            section,
            weight_bytes=weights,
            activation_bytes=activations,
            window_bytes=windows,
            sent_bytes=max(sent),
            host_bytes=host,
            # The first pass has to get through all ranks, and a step needs all its passes.
            step_s=(passes + len(runs) - 1) * a_pass_s,
            busy_s=passes * a_pass_s,
        )
        if self._missing(needed := weights + activations + windows):
            return replace(layout, refusal=f"needs {self._need(needed):.1f} GiB")
        return layout

    def _runs(self, degrees: Degrees) -> list[RankRun]:
        """Dry runs of the ranks that differ: one for each place in the pipeline."""
        base = replace(degrees, hsdp_shard=1, hsdp_replicate=1)
        if not base.expert:
            base = replace(base, replica=1)
        if self._known[0] != base:
            firsts = [rank for rank in range(base.world) if not _elsewhere(base.coordinates(rank))]
            runs = [RankRun(self._dry_run(base, rank)) for rank in firsts]
            self._known = base, runs
        return self._known[1]

    def _dry_run(self, degrees: Degrees, rank: int) -> DryRun:
        if degrees.expert:
            return DryRun(self._job.source, degrees, rank, DTYPE)
        # Ranks that share out tokens or branches hold the same.
        held = (degrees.tensor, degrees.pipeline, degrees.coordinates(rank)["pipeline"])
        if held not in self._models:
            self._models[held] = DryRun(self._job.source, degrees, rank, DTYPE).model
        return DryRun(self._job.source, degrees, rank, DTYPE, model=copy.deepcopy(self._models[held]))

    def _rank_s(self, step: Step, gathered_bytes: int, gatherings: int) -> float:
        """Computing and sending; HSDP's blocks travel while others run."""
        rates = self._rates
        compute_s = rates.compute_s(step.matmul_flops, step.attention_flops, self._tokens)
        wires_s = sum(rates.wire_s(kind, sent, step.sent_calls[kind]) for kind, sent in step.sent_bytes.items())
        return compute_s + wires_s + max(0.0, rates.wire_s("hsdp", gathered_bytes, gatherings) - compute_s)

    def _need(self, needed_bytes: int) -> float:
        return needed_bytes / GIB + self._rates.reserve_gib

    def _missing(self, needed_bytes: int) -> bool:
        return self._need(needed_bytes) * GIB > self._job.memory_bytes


class RankRun:
    """A rank's dry run, and its step once it is asked for."""

    def __init__(self, dry: DryRun) -> None:
        self.dry = dry
        self._step: Step | None = None

    def step(self, params: ResolvedParams, conditions: Tensors) -> Step:
        """Of the one job there is."""
        if self._step is None:
            self._step = self.dry.step(params, conditions)
        return self._step


def sections_of(gpus: int, branches: int, experts: bool) -> Iterator[ParallelSection]:
    """All ways to use so many GPUs; those that differ in HSDP alone one after the other.

    Args:
        branches: guidance branches of a request; more ranks than those would repeat each other's work.
        experts: whether the model has some to spread.
    """
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    for cfg, pipeline, tensor, ring, ulysses in itertools.product(sizes, repeat=5):
        sharing, split = cfg * ring * ulysses, pipeline * tensor
        section = ParallelSection(
            cfg_parallel_size=cfg,
            pipeline_parallel_size=pipeline,
            ulysses_degree=ulysses,
            ring_degree=ring,
            tensor_parallel_size=tensor,
        )
        if cfg > branches:
            continue
        if sharing * split == gpus:
            yield section
            for shards in sizes[1:]:
                if sharing % shards == 0:
                    yield replace(section, hsdp_shard_size=shards, hsdp_replicate_size=sharing // shards)
            if experts and sharing > 1:
                yield replace(section, enable_expert_parallel=True)
        elif sharing == 1 and gpus % split == 0:
            yield replace(section, hsdp_shard_size=gpus // split)


def _elsewhere(place: dict[str, int]) -> bool:
    """Whether a rank is not the first on an axis along which all do the same."""
    return any(index for axis, index in place.items() if axis != "pipeline")


def _order(layout: Layout) -> tuple[bool, float, int]:
    # Two digits: what is nearer than that is not told apart by arithmetic.
    return bool(layout.refusal), float(f"{layout.step_s:.2g}"), layout.sent_bytes
