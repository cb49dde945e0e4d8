"""Pipeline parallelism on the block list: each rank runs a range of blocks and passes the streams on.

Every rank embeds for itself, which costs about a block's hundredth, and takes over only the fields that blocks change;
so no shapes travel, and time embeddings and rotary factors need no wire. A send goes on while the next pass is worked
on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from services.family import ModelPlan
from services.parallel.collectives import count_sent
from services.parallel.degrees import split_sizes
from services.parallel.mesh import Axis

T = TypeVar("T")


class PipelineRank:
    """One rank's place in the pipeline."""

    def __init__(self, plan: ModelPlan, axis: Axis) -> None:
        self._flow = plan.flow
        self._axis = axis
        self.rank, self.size = axis.rank, axis.size
        # A send's buffer must live until the receiver has it.
        self._sending: list[tuple[dist.Work, torch.Tensor]] = []

    @property
    def last(self) -> bool:
        """Whether it holds the last blocks, and with them the head."""
        return self.rank == self.size - 1

    def own(self, blocks: Sequence[T]) -> Sequence[T]:
        """This rank's range of the block list."""
        return own_range(blocks, self.rank, self.size)

    def receive(self, streams: Any) -> Any:
        """The streams as the previous rank left them; the first rank's own."""
        if self.rank == 0:
            return streams
        taken = {field: torch.empty_like(tensor).contiguous() for field, tensor in self._flowing(streams)}
        for tensor in taken.values():
            if tensor.is_meta:
                continue  # a dry run: nobody sends
            dist.recv(tensor, self._axis.ranks[self.rank - 1], group=self._axis.group)
        return replace(streams, **taken)

    def send(self, streams: Any) -> None:
        """Passes the streams on without waiting for the receiver."""
        for sent, _ in self._sending:
            sent.wait()
        self._sending = []
        for _, value in self._flowing(streams):
            # A copy: the next pass may come out of the same CUDA graph, which writes to the same place.
            tensor = value.clone(memory_format=torch.contiguous_format)
            count_sent("pipeline", tensor)
            if tensor.is_meta:
                continue
            work = dist.isend(tensor, self._axis.ranks[self.rank + 1], group=self._axis.group)
            assert work is not None
            self._sending.append((work, tensor))

    def _flowing(self, streams: Any) -> list[tuple[str, torch.Tensor]]:
        """Fields that travel; not every model of a family has all."""
        fields = ((field, getattr(streams, field)) for field in self._flow)
        return [(field, tensor) for field, tensor in fields if tensor is not None]

    def share(self, outputs: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """The last rank's predictions, on every rank."""
        shared = outputs.contiguous() if outputs is not None else like
        if self.last:
            count_sent("broadcast", shared)
        if not shared.is_meta:
            dist.broadcast(shared, self._axis.ranks[-1], group=self._axis.group)
        return shared


def own_range(blocks: Sequence[T], rank: int, size: int) -> Sequence[T]:
    """Rank `rank`'s blocks of a pipeline of `size`."""
    sizes = split_sizes(len(blocks), size)
    first = sum(sizes[:rank])
    return blocks[first : first + sizes[rank]]
