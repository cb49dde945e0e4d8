"""HSDP: the weights of each block lie in shards over the ranks, and are gathered a block ahead of their use.

Sharding and gathering are PyTorch's FSDP2 (`fully_shard`, arXiv 2304.11277), replicas of shards its 2-D mesh. Its own
hooks hang on a module's call; here blocks are run by the block list, so when to gather and when to let go is said here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from services.family import Block
from services.parallel.collectives import count_sent
from services.parallel.experts import SpreadExperts


def shard_blocks(blocks: Sequence[Block], mesh: DeviceMesh) -> list[Block]:
    """The same blocks with sharded weights: at most two blocks' weights are whole at a time."""
    for block in blocks:
        fully_shard(block.module, mesh=mesh, ignored_params=_spread(block.module))
        module: Any = block.module
        # Inference needs no gradients, so nothing is kept for a backward pass.
        module.set_requires_gradient_sync(False)
        module.set_custom_all_gather(CountedGather())
    return [replace(block, run=_gathered(blocks, index)) for index, block in enumerate(blocks)]


class CountedGather:
    """FSDP2's own way of gathering, with a count of what it sends."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Where a block's weights arrive."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Every rank's piece on every rank."""
        count_sent("hsdp", input_tensor, group.size() - 1)
        work: dist.Work | None = dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)
        return work


def _spread(block: nn.Module) -> set[nn.Parameter]:
    """Experts differ from rank to rank, and are spread over the same ranks already."""
    return {weight for module in block.modules() if isinstance(module, SpreadExperts) for weight in module.parameters()}


def _gathered(blocks: Sequence[Block], index: int) -> Any:
    block: Any = blocks[index].module
    following: Any = blocks[index + 1].module if index + 1 < len(blocks) else None
    run = blocks[index].run

    def gathered(streams: Any) -> Any:
        # Waits for a gathering under way, or starts one for the first block.
        block.unshard()
        if following is not None:
            following.unshard(async_op=True)
        streams = run(streams)
        block.reshard()
        return streams

    return gathered


@dataclass(frozen=True, slots=True)
class Shards:
    """Bytes of one block on one rank: gathered, held between two uses, and sent so that it is gathered everywhere."""

    whole: int = 0
    held: int = 0
    sent: int = 0


def plan_shards(block: nn.Module, shards: int, index: int) -> Shards:
    """What `shard_blocks` makes of a block on rank `index` of `shards`, by arithmetic.

    The rows of each weight lie in equal pieces, of which the last may be short or empty; they travel filled up.
    """
    spread = _spread(block)
    plan = Shards()
    for weight in block.parameters():
        if weight in spread:
            continue
        size, rows = weight.numel() * weight.element_size(), weight.shape[0] if weight.ndim else 1
        piece = -(-rows // shards)
        held = max(0, min(piece, rows - piece * index)) * size // rows
        plan = Shards(plan.whole + size, plan.held + held, plan.sent + (shards - 1) * piece * size // rows)
    return plan
