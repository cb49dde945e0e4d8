"""How rows get through the model, on one rank or many.

A pass is the rows of one forward. A beat takes one pass in and lets one out: at once on one rank; behind a pipeline of
n ranks, the pass that came in n - 1 beats earlier, so that all ranks work while several passes are under way. Passes of
different guidance branches go to different ranks of the cfg axis; each rank then knows every prediction, so that all
ranks keep the same states. Every rank calls the same things in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_svc.idle_experts import IdleExperts
from services.family import Block, DenoiseState, DitModel, DitPart, Row
from services.features import BlockRun, Wrap, as_it_is
from services.parallel.collectives import all_gather
from services.parallel.hsdp import shard
from services.parallel.mesh import Axis, Mesh
from services.parallel.pipeline import PipelineRank
from services.parallel.sequence import Places, SequenceParallel
from services.parallel.tensor_sequence import TensorSequence

# Up to this many tokens a row, branches gain from sharing a forward: weights are read once, and collectives are fewer.
# Beyond, attention outweighs that, and a second row's activations cost memory.
ROWS_UP_TO_TOKENS = 8192
# Behind a pipeline, branches apart are what fills it; they share where a forward is bound by overheads.
ROWS_IN_PIPELINE_UP_TO_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows of one forward for each rank of the cfg axis: `by_rank[i]` are those that rank i computes.

    The last pass of a step may have fewer groups than ranks; then some compute what others do, and nobody waits less.
    """

    expert: str
    by_rank: tuple[tuple[Row, ...], ...]
    groups: int


@dataclass(frozen=True, slots=True)
class Predicted:
    """One row's prediction [1, ...]."""

    request_id: str
    branch: str
    output: torch.Tensor


@dataclass(slots=True)
class Part:
    """Rows that go through the blocks together.

    Attributes:
        whole: their streams as the family made them; shared: this rank's piece of the sequence.
        places: of the piece's tokens.
        streams: what the next block takes.
    """

    whole: Any
    shared: Any
    places: Places
    streams: Any

    def take(self) -> Any:
        """The streams, which are kept no longer here: a block's input goes when the next block runs."""
        streams, self.streams = self.streams, None
        return streams


class Forward:
    """Runs passes. `mesh` is None on one rank.

    Args:
        wrap: what features put around the run of a block list.
        idle: keeps experts that are not wanted off the device.
    """

    def __init__(
        self,
        model: DitModel,
        part: DitPart,
        branches: str,
        mesh: Mesh | None = None,
        wrap: Wrap = as_it_is,
        idle: IdleExperts | None = None,
    ) -> None:
        self._idle = idle
        self._model = model
        self._part = part
        self._branches = branches
        self._cfg: Axis | None = mesh["cfg"] if mesh and mesh["cfg"].size > 1 else None
        self._sequence = SequenceParallel(part.plan, mesh) if mesh and mesh.sequence.size > 1 else None
        self._region = TensorSequence(part.plan, mesh["tensor"]) if mesh and mesh.degrees.tensor_sequence else None
        self._pipeline = PipelineRank(part.plan, mesh["pipeline"]) if mesh and mesh["pipeline"].size > 1 else None
        blocks = {name: self._own(part.blocks(module)) for name, module in model.modules.items()}
        if self._region is not None:
            for module in model.modules.values():
                self._region.apply(module)
        self._sharded = shard(model.modules, blocks, mesh.hsdp(), model.device) if mesh and mesh.degrees.hsdp else {}
        self._through = {name: wrap(_run_of(own), self._lengths) for name, own in blocks.items()}
        if self._sequence is not None:
            for kind in part.plan.spread:
                model.attention[kind].across = self._sequence.attend
        self._under_way: deque[Pass | None] = deque([None] * (self.depth - 1))
        self.rows = 0

    @property
    def depth(self) -> int:
        """Passes that can be under way at once."""
        return self._pipeline.size if self._pipeline else 1

    @property
    def empty(self) -> bool:
        """Whether no pass is under way."""
        return not any(self._under_way)

    def passes(self, states: Sequence[DenoiseState]) -> list[Pass]:
        """What one step of a batch takes."""
        part, model = self._part, self._model
        expert, branches = part.expert(model, states[0]), part.branches(model, states[0])
        groups = [tuple(Row(state, branch) for state in states) for branch in branches]
        ranks = self._cfg.size if self._cfg else 1
        if ranks == 1 and self._rows_together(states[0]):
            groups = [tuple(Row(state, branch) for state in states for branch in branches)]
        return [
            Pass(expert, tuple(groups[(first + rank) % len(groups)] for rank in range(ranks)), len(groups) - first)
            for first in range(0, len(groups), ranks)
        ]

    def _rows_together(self, state: DenoiseState) -> bool:
        if self._branches != "auto":
            return self._branches == "rows"
        if self._pipeline:
            return self._tokens(state) <= ROWS_IN_PIPELINE_UP_TO_TOKENS
        # Weights that have to be gathered are gathered once for both branches.
        return bool(self._sharded) or self._tokens(state) <= ROWS_UP_TO_TOKENS

    def _tokens(self, state: DenoiseState) -> int:
        return self._part.token_count(self._model, state.params)

    def beat(self, entering: Pass | None) -> list[Predicted]:
        """Takes a pass in, works, and returns the predictions of the pass that has come out."""
        self._under_way.appendleft(entering)
        try:
            outputs = self._work()
        except BaseException:
            # What was under way is lost with it: the next beat starts with an empty pipeline.
            self._under_way = deque([None] * (self.depth - 1))
            raise
        leaving = self._under_way.pop()
        if leaving is None:
            return []
        own = self._cfg.rank if self._cfg else 0
        if self._pipeline:
            outputs = self._pipeline.share(outputs, self._like(leaving.by_rank[own]))
        assert outputs is not None
        by_rank = all_gather(outputs, self._cfg.name, self._cfg.size) if self._cfg else outputs[None]
        return [
            Predicted(row.state.request_id, row.branch, output[None])
            for rows, stacked in list(zip(leaving.by_rank, by_rank, strict=True))[: leaving.groups]
            for row, output in zip(rows, stacked, strict=True)
        ]

    def _work(self) -> torch.Tensor | None:
        """This rank's share of the pass that has reached it; predictions where it holds the last blocks."""
        place = self._pipeline.rank if self._pipeline else 0
        reached = self._under_way[place]
        if reached is None:
            return None
        rows = reached.by_rank[self._cfg.rank if self._cfg else 0]
        self.rows += len(rows)
        module = self._idle.enter(reached.expert) if self._idle else self._model.modules[reached.expert]
        places = self._parts(rows)
        parts = [self._enter(module, [rows[place] for place in together]) for together in places]
        if reached.expert in self._sharded:
            for block in self._sharded[reached.expert].whole():
                self._run(parts, block.run)
        else:
            self._run(parts, self._through[reached.expert])
        if self._pipeline and not self._pipeline.last:
            for part in parts:
                self._pipeline.send(part.streams)
            return None
        outputs = [self._leave(module, part) for part in parts]
        if len(outputs) == 1:
            return outputs[0]
        order = torch.tensor([place for together in places for place in together]).argsort()
        return torch.cat(outputs)[order.to(outputs[0].device)]

    def _parts(self, rows: Sequence[Row]) -> list[list[int]]:
        """Which rows share kernels. Long ones share the gathering of weights only."""
        together = list(range(len(rows)))
        if not self._sharded or self._branches != "auto" or self._tokens(rows[0].state) <= ROWS_UP_TO_TOKENS:
            return [together]
        branches = dict.fromkeys(row.branch for row in rows)
        return [[place for place in together if rows[place].branch == branch] for branch in branches]

    def _enter(self, module: torch.nn.Module, rows: Sequence[Row]) -> Part:
        whole = self._part.embed(module, self._part.collate(self._model, rows))
        shared = self._sequence.cut(whole) if self._sequence else whole
        places = self._sequence.places if self._sequence else Places()
        streams = self._region.cut(shared) if self._region else shared
        if self._pipeline:
            streams = self._pipeline.receive(streams)
        return Part(whole, shared, places, streams)

    def _run(self, parts: Sequence[Part], run: BlockRun) -> None:
        for part in parts:
            self._fit(part)
            part.streams = run(part.take())

    def _fit(self, part: Part) -> None:
        """What ranks know of the tokens is of the part in hand."""
        if self._sequence:
            self._sequence.places = part.places
        if self._region:
            self._region.fit(part.shared)

    def _leave(self, module: torch.nn.Module, part: Part) -> torch.Tensor:
        self._fit(part)
        hidden = self._region.join(part.streams.hidden) if self._region else part.streams.hidden
        if self._sequence:
            hidden = self._sequence.join(hidden, part.whole.hidden.shape[1])
        return self._part.head(module, replace(part.whole, hidden=hidden))

    def _lengths(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of the whole fields that are spread over ranks: pieces of two lengths may be alike."""
        whole = (tuple(self._sequence.places.lengths.tolist()),) if self._sequence else ()
        return whole + (self._region.lengths if self._region else ())

    def _own(self, blocks: Sequence[Block]) -> Sequence[Block]:
        return self._pipeline.own(blocks) if self._pipeline else blocks

    def _like(self, rows: Sequence[Row]) -> torch.Tensor:
        """Where a rank without the last blocks puts predictions: they have the latents' shape."""
        shape = (len(rows), *rows[0].state.latents.shape[1:])
        return torch.empty(shape, dtype=self._model.dtype, device=self._model.device)


def _run_of(blocks: Sequence[Block]) -> BlockRun:
    def run(streams: Any) -> Any:
        for block in blocks:
            streams = block.run(streams)
        return streams

    return run


def by_branch(predicted: Sequence[Predicted]) -> Mapping[str, dict[str, torch.Tensor]]:
    """Predictions as `DitPart.combine` takes them, by request."""
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for one in predicted:
        grouped.setdefault(one.request_id, {})[one.branch] = one.output
    return grouped
