"""HSDP: weights lie in shards over the ranks; those of blocks are gathered a block ahead of their use.

Sharding and gathering are PyTorch's FSDP2 (`fully_shard`, arXiv 2304.11277), replicas of shards its 2-D mesh. Its own
hooks hang on a module's call; here blocks are run by the block list, so when to gather and when to let go is said here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from services.family import Block
from services.parallel.collectives import count_sent, peer_memory
from services.parallel.experts import SpreadExperts
from services.parallel.peer_memory import PeerMemory


class ShardedBlocks:
    """Blocks with sharded weights: at most two blocks' weights are whole at a time.

    What lies outside the blocks is sharded too, a part at a time, and gathered by FSDP2's own hooks when it is called.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[Block], mesh: DeviceMesh) -> None:
        for part in outside(module, blocks):
            _shard(part, mesh, reshard_after_forward=True)
        for block in blocks:
            _shard(block.module, mesh, ignored_params=_spread(block.module))
        self._blocks = blocks

    def whole(self) -> Iterator[Block]:
        """The blocks one after the other, each with whole weights until the next one is asked for."""
        for index, block in enumerate(self._blocks):
            module: Any = block.module
            # Waits for a gathering under way, or starts one for the first block.
            module.unshard()
            if index + 1 < len(self._blocks):
                following: Any = self._blocks[index + 1].module
                following.unshard(async_op=True)
            yield block
            module.reshard()


def outside(module: nn.Module, blocks: Sequence[Block]) -> Iterator[nn.Module]:
    """The parts with weights that are not in a block: embeddings, projections, the head."""
    inside = {block.module for block in blocks}
    for child in module.children():
        if child in inside:
            continue
        if isinstance(child, nn.ModuleList) or not inside.isdisjoint(child.modules()):
            yield from outside(child, blocks)
        elif any(True for _ in child.parameters()):
            yield child


def _shard(part: Any, mesh: DeviceMesh, **options: Any) -> None:
    fully_shard(part, mesh=mesh, **options)
    # Inference needs no gradients, so nothing is kept for a backward pass.
    part.set_requires_gradient_sync(False)
    part.set_custom_all_gather(Gather())


class Gathered(dist.Work):
    """Weights that copy engines bring."""

    def __init__(self, peers: PeerMemory) -> None:
        super().__init__()
        self._peers, self._mark = peers, peers.mark()

    def wait(self, _timeout: timedelta = timedelta(0)) -> bool:
        """What follows on this stream comes after their arrival; the host does not wait."""
        self._peers.wait(self._mark)
        return True


class Gather:
    """How FSDP2 gathers a block's weights: out of the peers' memory where there is a way to it, beside the work.

    NCCL's kernels would take multiprocessors from the block that runs meanwhile.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Where a block's weights arrive."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Every rank's piece on every rank; `input_tensor` is this one's place in the output."""
        count_sent("hsdp", input_tensor, group.size() - 1)
        if (peers := peer_memory.get(group.group_name)) is None:
            work: dist.Work | None = dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)
            return work
        places = output_tensor.view(group.size(), -1)
        with peers.aside():
            for rank, piece in enumerate(peers.show(input_tensor, group.size())):
                if rank != peers.rank:
                    places[rank].copy_(piece)
            gathered = Gathered(peers)
        if async_op:
            return gathered
        gathered.wait()
        return None


def _spread(block: nn.Module) -> set[nn.Parameter]:
    """Experts differ from rank to rank, and are spread over the same ranks already."""
    return {weight for module in block.modules() if isinstance(module, SpreadExperts) for weight in module.parameters()}


@dataclass(frozen=True, slots=True)
class Shards:
    """Bytes of one block, or of a part outside of them, on one rank.

    Attributes:
        whole: its weights.
        held: the rank's pieces of them.
        gathered: while it is whole; pieces are filled up to one size.
        sent: by the rank, so that it becomes whole everywhere.
    """

    whole: int = 0
    held: int = 0
    gathered: int = 0
    sent: int = 0


def plan_shards(block: nn.Module, shards: int, index: int) -> Shards:
    """What `_shard` makes of a block or a part on rank `index` of `shards`, by arithmetic.

    The rows of each weight lie in equal pieces, of which the last may be short or empty.
    """
    spread = _spread(block)
    whole = held = filled = 0
    for weight in block.parameters():
        if weight in spread:
            continue
        rows = weight.shape[0] if weight.ndim else 1
        row_bytes = weight.numel() * weight.element_size() // rows
        piece = -(-rows // shards)
        whole += rows * row_bytes
        held += max(0, min(piece, rows - piece * index)) * row_bytes
        filled += piece * row_bytes
    return Shards(whole, held, filled * shards, filled * (shards - 1))
