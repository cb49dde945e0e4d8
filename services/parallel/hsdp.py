"""HSDP: the weights of each block lie in shards over the ranks, and are gathered a block ahead of their use.

Sharding and gathering are PyTorch's FSDP2 (`fully_shard`, arXiv 2304.11277), replicas of shards its 2-D mesh. Its own
hooks hang on a module's call; here blocks are run by the block list, so when to gather and when to let go is said here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from services.family import Block
from services.parallel.experts import SpreadExperts


def shard_blocks(blocks: Sequence[Block], mesh: DeviceMesh) -> list[Block]:
    """The same blocks with sharded weights: at most two blocks' weights are whole at a time."""
    for block in blocks:
        fully_shard(block.module, mesh=mesh, ignored_params=_spread(block.module))
        module: Any = block.module
        # Inference needs no gradients, so nothing is kept for a backward pass.
        module.set_requires_gradient_sync(False)
    return [replace(block, run=_gathered(blocks, index)) for index, block in enumerate(blocks)]


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
