"""Expert parallelism (arXiv 2006.16668): the experts of a block lie on the ranks that share it, tokens travel to them.

Each rank holds whole experts, nearly as many as the others. Counts are exchanged first, then every token goes to the
rank of its expert in one all-to-all of uneven pieces, and its result comes back in another. Which lists of modules are
experts is data in the `ModelPlan`. Shapes: n ranks, E experts in all, N tokens of this rank, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from services.errors import StartupError
from services.experts import token_counts
from services.family import ModelPlan
from services.parallel.collectives import all_gather, all_to_all_uneven
from services.parallel.degrees import split_sizes
from services.parallel.mesh import Axis
from services.parallel.tensor import matches


class SpreadExperts(nn.Module):
    """This rank's experts under their numbers among all, called as if all were here (`services/experts.py`)."""

    def __init__(self, experts: Sequence[nn.Module], axis: Axis) -> None:
        super().__init__()
        self._axis = axis
        self._held = split_sizes(len(experts), axis.size)
        first = sum(self._held[: axis.rank])
        for number in range(first, first + self._held[axis.rank]):
            self.add_module(str(number), experts[number])

    def forward(self, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """What all experts make of tokens [N, D], which stand in the order of their experts.

        Args:
            counts: [E] tokens of each expert.
        """
        axis = self._axis
        gathered = all_gather(counts, axis.name, axis.size)
        everyones = [token_counts(tokens, row) for row in gathered.unbind()]
        sent = [sum(piece) for piece in self._by_holder(everyones[axis.rank])]
        # [n][own experts]: the tokens that come from each rank.
        coming = [self._by_holder(row)[axis.rank] for row in everyones]
        received = [sum(row) for row in coming]
        arrived = all_to_all_uneven(tokens, sent, received, axis.rank, axis.name)
        results = self._run(arrived, coming)
        back: torch.Tensor = all_to_all_uneven(results, received, sent, axis.rank, axis.name)
        return back

    def _run(self, arrived: torch.Tensor, coming: list[list[int]]) -> torch.Tensor:
        """Each own expert on its tokens from all ranks; results in the order of arrival, rank by rank."""
        experts = list(self.children())
        pieces = arrived.split([count for row in coming for count in row])
        by_expert = []
        for index, expert in enumerate(experts):
            made = expert(torch.cat(pieces[index :: len(experts)]))
            by_expert.append(made.split([row[index] for row in coming]))
        return torch.cat([made[rank] for rank in range(len(coming)) for made in by_expert])

    def _by_holder(self, counts: list[int]) -> list[list[int]]:
        """[E] counts as lists for the experts of each rank."""
        lists, first = [], 0
        for held in self._held:
            lists.append(counts[first : first + held])
            first += held
        return lists


def spread_experts(module: nn.Module, plan: ModelPlan, axis: Axis) -> frozenset[str]:
    """Leaves this rank's experts in the module, and lets tokens travel to the others.

    Returns:
        The names of the parameters that other ranks hold.

    Raises:
        StartupError: the model has no experts, or fewer than there are ranks.
    """
    before = {name for name, _ in module.named_parameters()}
    lists: list[tuple[str, Any]] = [item for item in module.named_modules() if matches(item[0], plan.experts)]
    if not lists:
        raise StartupError("parallel.enable_expert_parallel is on, but the model has no experts: turn it off")
    for name, experts in lists:
        if axis.size > len(experts):
            raise StartupError(
                f"parallel.enable_expert_parallel: {axis.size} ranks share a block, but it has {len(experts)} experts:"
                f" let cfg_parallel_size x ulysses_degree x ring_degree be {len(experts)} at most"
            )
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, SpreadExperts(list(experts), axis))
    return frozenset(before - {name for name, _ in module.named_parameters()})
