"""Which weights of a denoiser a rank holds: its parts of linears, its range of blocks, its experts.

A `Partition` is given to a `ModelSource`, which asks it before it reads a file: what it does not hold is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from services.family import Block, ModelPlan
from services.parallel.degrees import check_blocks, check_heads
from services.parallel.experts import spread_experts
from services.parallel.mesh import Mesh
from services.parallel.pipeline import own_range
from services.parallel.tensor import Cut, split_linears


class Absent(nn.Module):
    """A block that another rank holds."""

    def forward(self, *_arguments: Any, **_more: Any) -> torch.Tensor:
        """Never called."""
        raise AssertionError("this block is on another rank of the pipeline")


@dataclass(frozen=True, slots=True)
class Partition:
    """One rank's share, by tensor, pipeline and expert parallelism."""

    plan: ModelPlan
    blocks: Callable[[nn.Module], Sequence[Block]]
    mesh: Mesh

    def apply(self, module: Any) -> dict[str, Cut]:
        """Leaves this rank's share in the module, whose weights may be on the meta device.

        Returns:
            How each parameter that was cut lies in the whole one, by name.

        Raises:
            StartupError: heads or blocks that the degrees do not divide, or experts that are too few.
        """
        degrees = self.mesh.degrees
        names = [block.name for block in self.blocks(module)]
        check_blocks(degrees, len(names))
        check_heads(degrees, int(module.config[self.plan.heads]))
        own = set(own_range(names, self.mesh["pipeline"].rank, degrees.pipeline))
        for name in names:
            if name not in own:
                parent, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(parent), attribute, Absent())
        if degrees.expert:
            spread_experts(module, self.plan, self.mesh.sharing)
        return split_linears(module, self.plan, self.mesh["tensor"]) if degrees.tensor > 1 else {}
