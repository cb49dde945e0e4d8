"""Tensor parallelism of text encoders: modules of transformers, cut as an `EncoderPlan` says.

Linears are cut as those of a denoiser. Keys and values that several query heads share are cut by head while there are
enough, and held by several ranks where there are not. Tables of words are cut by feature and gather their results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from services.errors import StartupError
from services.family import EncoderPlan, ModelPlan
from services.parallel.collectives import all_gather
from services.parallel.degrees import check_features, check_heads
from services.parallel.mesh import Mesh
from services.parallel.tensor import ColumnLinear, Cut, held_part, matches, split_linears

# What attention modules call their number of heads.
HEAD_COUNTS = ("n_heads", "num_heads")
SHARED_HEADS = ("k_proj", "v_proj")


class ColumnEmbedding(nn.Module):
    """Word numbers [...] to [..., D], of which this rank holds D / n features."""

    def __init__(self, weight: nn.Parameter, group: str, size: int) -> None:
        super().__init__()
        self.weight = weight
        self._group, self._size = group, size

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """See the class."""
        whole: torch.Tensor = all_gather(F.embedding(ids, self.weight), self._group, self._size)
        return whole.movedim(0, -2).flatten(-2)


@dataclass(frozen=True, slots=True)
class EncoderPartition:
    """One rank's share of an encoder."""

    plan: EncoderPlan
    mesh: Mesh

    def apply(self, module: nn.Module) -> dict[str, Cut]:
        """Leaves this rank's share in the module, whose weights may be on the meta device.

        Returns:
            How each parameter that was cut lies in the whole one, by name.

        Raises:
            StartupError: heads or features that the ranks do not divide.
        """
        plan = self.plan
        cuts: dict[str, Cut] = {}
        parts = list(module.named_modules())
        # Heads first: what divides them divides features too, mostly, and a refusal names numbers.
        for name, part in parts:
            if matches(name, plan.attention):
                cuts |= self._cut_heads(name, part)
        for name, part in parts:
            if matches(name, plan.unused):
                _put(module, name, nn.Identity())
            elif matches(name, plan.tables):
                cuts |= self._cut_table(module, name, part)
        linears = ModelPlan(block_classes=(), column=plan.column, row=plan.row, segments=plan.segments)
        return cuts | split_linears(module, linears, self.mesh["tensor"])

    def _cut_heads(self, name: str, attention: Any) -> dict[str, Cut]:
        """Numbers of heads, keys and values of shared heads, and what an attention adds for each head and distance."""
        axis = self.mesh["tensor"]
        cuts: dict[str, Cut] = {}
        for count in HEAD_COUNTS:
            if hasattr(attention, count):
                check_heads(self.mesh.degrees, getattr(attention, count))
                setattr(attention, count, getattr(attention, count) // axis.size)
        if hasattr(attention, "k_proj"):
            width = attention.head_dim
            heads, shared = attention.q_proj.out_features // width, attention.k_proj.out_features // width
            check_heads(self.mesh.degrees, heads)
            ranges = _own_heads(shared, axis.size, axis.rank)
            for linear in SHARED_HEADS:
                cut = Cut(0, ((ranges[0] * width, ranges[1] * width),))
                layer = getattr(attention, linear)
                bias = None if layer.bias is None else held_part(layer.bias, cut)
                setattr(attention, linear, ColumnLinear(held_part(layer.weight, cut), bias, axis, gather=False))
                cuts |= {f"{name}.{linear}.weight": cut} | ({} if bias is None else {f"{name}.{linear}.bias": cut})
            attention.num_key_value_groups = heads // axis.size // (ranges[1] - ranges[0])
        if getattr(attention, "has_relative_attention_bias", False):
            table = attention.relative_attention_bias
            cut = self._features(table.embedding_dim, f"{name}.relative_attention_bias")
            table.weight = held_part(table.weight, cut)
            cuts[f"{name}.relative_attention_bias.weight"] = cut
        return cuts

    def _cut_table(self, module: nn.Module, name: str, table: Any) -> dict[str, Cut]:
        axis = self.mesh["tensor"]
        cut = self._features(table.embedding_dim, name)
        _put(module, name, ColumnEmbedding(held_part(table.weight, cut), axis.name, axis.size))
        return {f"{name}.weight": cut}

    def _features(self, features: int, name: str) -> Cut:
        axis = self.mesh["tensor"]
        check_features(axis.size, features, name)
        share = features // axis.size
        return Cut(1, ((share * axis.rank, share * (axis.rank + 1)),))


def _own_heads(shared: int, ranks: int, rank: int) -> tuple[int, int]:
    """The first of the shared heads that a rank's queries need, and the one after the last."""
    if shared % ranks and ranks % shared:
        fitting = [str(size) for size in range(1, 65) if not shared % size or not size % shared]
        raise StartupError(
            f"parallel.tensor_parallel_size {ranks} neither divides the {shared} key and value heads nor is a multiple"
            f" of them: use {', '.join(fitting[:8])}"
        )
    own = max(1, shared // ranks)
    first = rank * shared // ranks
    return first, first + own


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, part)
