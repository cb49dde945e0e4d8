"""CUDA graphs: what the host launches for all blocks of a forward is recorded once and launched as one.

For work whose kernels are shorter than the host takes to launch them: small pictures, and shares of a model that
several ranks hold. A graph is for one shape, text length and filling; others run as they are until they have come
twice. Its results are those of the same kernels, bit for bit. Graphs share one pool of memory: one runs at a time.
"""

from __future__ import annotations

import gc
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from services.family import DitModel, DitPart, ModelPlan
from services.features import Applied, Beside, BlockRun
from services.parallel.collectives import Held, held_by_graph

NAME = "graphs"
EXACT = True
# The axes whose ranks send within blocks.
SPREAD = ("ring", "tensor", "ulysses")
# Shapes that are counted at most; then counting begins anew.
SEEN = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`kept` graphs at most, the least recently used goes; one is made when its shapes come for the `after` + 1st time.

    Each holds its inputs and outputs; what lies between is shared. What is compiled, or allocated for good, at the
    first time must not happen inside a graph: `after` is 1 or more.

    Raises:
        ValueError: an option out of range.
    """

    kept: int = 8
    after: int = 2

    def __post_init__(self) -> None:
        if self.kept < 1 or self.after < 1:
            raise ValueError(f"features.graphs: kept is {self.kept} and after {self.after}, both are 1 or more")


def supports(plan: ModelPlan, device_type: str, active: frozenset[str]) -> str | None:
    """Needs launches that depend on shapes alone."""
    if device_type != "cuda":
        return f"a graph is of a CUDA device's launches, and 0 of them are made on {device_type}"
    if plan.experts:
        return "how many of the tokens go to each expert is known only after the router's kernel, a graph has it fixed"
    if "hsdp" in active:
        return "weights that HSDP gathers lie at 2 or more places in turn, a graph reads from 1"
    by_nccl = [axis for axis in SPREAD if axis in active and f"{axis} by peers" not in active]
    if by_nccl:
        return f"within blocks the ranks of {', '.join(by_nccl)} send by NCCL, which 0 tests have run from a graph"
    return None


def apply(model: DitModel, part: DitPart, config: Config) -> Applied:
    """Wraps the block lists of all experts, each with graphs of its own."""
    made: list[Graphs] = []

    def wrap(run: BlockRun, beside: Beside) -> BlockRun:
        made.append(Graphs(run, config, beside))
        return made[-1]

    def metrics() -> dict[str, float]:
        return {
            "dit_graphs": float(sum(len(graphs.recorded) for graphs in made)),
            "dit_graph_replays_total": float(sum(graphs.replays for graphs in made)),
        }

    return Applied(json.dumps({"kept": config.kept, "after": config.after}), wrap=wrap, metrics=metrics)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A graph with the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    outputs: Any
    held: Held


class Graphs:
    """Runs a block list, from graphs where there is one.

    Attributes:
        recorded: by what is fixed in it, the most recently used last.
        replays: launches of graphs.
    """

    def __init__(self, run: BlockRun, config: Config, beside: Beside) -> None:
        self._run, self._config, self._beside = run, config, beside
        self._seen: Counter[Any] = Counter()
        self._pool: Any = None
        self.recorded: OrderedDict[Any, Recorded] = OrderedDict()
        self.replays = 0

    def __call__(self, streams: Any) -> Any:
        """What leaves the blocks lies in the graph's memory: it may be read until the same shapes come again."""
        key = (self._beside(), key_of(streams))
        if (recorded := self.recorded.get(key)) is None:
            if self._seen[key] < self._config.after:
                # What is compiled meanwhile must fit the copies that a graph reads: views, and tensors made outside of
                # inference mode, are of other kinds.
                leaving = self._run(map_device_tensors(streams, torch.clone))
                if len(self._seen) > SEEN:
                    self._seen.clear()
                # Now, as a run that failed may not have come to all that must happen outside of a graph.
                self._seen[key] += 1
                return leaving
            recorded = self._record(key, streams)
        self.recorded.move_to_end(key)
        for mine, given in zip(recorded.inputs, device_tensors(streams), strict=True):
            mine.copy_(given)
        recorded.graph.replay()
        recorded.held.count()
        self.replays += 1
        return recorded.outputs

    def _record(self, key: Any, streams: Any) -> Recorded:
        del self._seen[key]
        while len(self.recorded) >= self._config.kept:
            self.recorded.popitem(last=False)[1].held.let_go()
        inputs = map_device_tensors(streams, torch.clone)
        # One whose graphs have all gone takes no other while somebody still has what they gave.
        if not self.recorded:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads of a rank copy to and from the device meanwhile.
        with (
            nothing_collected(),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            held_by_graph() as held,
        ):
            outputs = self._run(inputs)
        recorded = self.recorded[key] = Recorded(graph, list(device_tensors(inputs)), outputs, held)
        return recorded


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Python collects its garbage before and not inside: an older graph in it spoils one that is being made."""
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def key_of(streams: Any) -> Any:
    """What a graph has fixed: shapes and dtypes of tensors on the device, and the values of all else."""
    key: list[Any] = [type(streams)]
    for value in _values(streams):
        if not isinstance(value, torch.Tensor):
            key.append(value)
        elif value.device.type == "cpu":
            key.append(tuple(value.flatten().tolist()))
        else:
            key.append((value.shape, value.dtype))
    return tuple(key)


def device_tensors(streams: Any) -> Iterator[torch.Tensor]:
    """The tensors on the device, in their order."""
    for value in _values(streams):
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            yield value


def map_device_tensors(streams: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The streams with other tensors in place of those on the device."""

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(changed(item) for item in value)
        return change(value) if isinstance(value, torch.Tensor) and value.device.type != "cpu" else value

    return replace(streams, **{field.name: changed(getattr(streams, field.name)) for field in fields(streams)})


def _values(streams: Any) -> Iterator[Any]:
    for field in fields(streams):
        value = getattr(streams, field.name)
        if isinstance(value, tuple):
            yield from value
        else:
            yield value
