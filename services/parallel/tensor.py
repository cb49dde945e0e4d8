"""Tensor parallelism (arXiv 1909.08053): linears cut by output or input features, one sum a pair.

A column linear holds some output features and leaves its result cut; a row linear holds the matching input features and
sums over the ranks. Modulation and embedding linears, a third of some models, are cut by output too and gather their
small results. Which linear is which is data in the `ModelPlan`. Shapes: n ranks, I and O features in and out.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from services.family import ModelPlan
from services.parallel.collectives import all_gather, all_reduce
from services.parallel.degrees import check_features
from services.parallel.mesh import Axis

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a weight that a rank holds: `ranges` of (start, end) along `dim`, one after the other."""

    dim: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Along `dim`."""
        return sum(end - start for start, end in self.ranges)

    def of(self, weight: Any) -> torch.Tensor:
        """From a tensor or a slice of a safetensors file, of which only the ranges are read."""
        before = (slice(None),) * self.dim
        parts = [weight[(*before, slice(start, end))] for start, end in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)


class ColumnLinear(nn.Module):
    """[..., I] to this rank's [..., O / n], or, with `gather`, to all of [..., O]."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, axis: Axis, gather: bool) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self._group, self._size, self.gathers = axis.name, axis.size, gather

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See the class."""
        mine = F.linear(features, self.weight, self.bias)
        if not self.gathers:
            return mine
        whole: torch.Tensor = all_gather(mine, self._group, self._size)
        return whole.movedim(0, -2).flatten(-2)


class Tokens(Protocol):
    """Where a sum over the ranks is to end in pieces of the tokens (`tensor_sequence.py`)."""

    def scatter(self, part: torch.Tensor) -> torch.Tensor:
        """Each rank's part [B, S, ...] to this rank's tokens of the sum."""


class SumOverRanks(nn.Module):
    """Each rank's part [...] to the sum over all ranks.

    Attributes:
        tokens: set where a rank is to get its piece of the tokens only.
    """

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self._group, self._size = axis.name, axis.size
        self.tokens: Tokens | None = None

    def forward(self, part: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self.tokens is not None:
            return self.tokens.scatter(part)
        total: torch.Tensor = all_reduce(part, self._group, self._size)
        return total


class RowLinear(SumOverRanks):
    """This rank's [..., I / n] to the sum over all ranks, [..., O]."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, axis: Axis) -> None:
        super().__init__(axis)
        self.weight, self.bias = weight, bias

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See the class."""
        total = super().forward(F.linear(features, self.weight))
        return total if self.bias is None else total + self.bias


class PartialLinear(nn.Module):
    """This rank's [..., I / n] to its part of the sum, [..., O]; a `SumOverRanks` further on completes it."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return F.linear(features, self.weight)


class SpreadRMSNorm(nn.Module):
    """RMS norm over features that lie on several ranks: the mean square is summed over them."""

    def __init__(self, weight: nn.Parameter, eps: float, axis: Axis) -> None:
        super().__init__()
        self.weight = weight
        self._eps, self._group, self._size = eps, axis.name, axis.size

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[..., O / n], normalised by the root mean square of all O."""
        wide = features.float()
        mean = all_reduce(wide.square().mean(dim=-1, keepdim=True), self._group, self._size) / self._size
        return (wide * torch.rsqrt(mean + self._eps)).type_as(features) * self.weight


def split_linears(module: nn.Module, plan: ModelPlan, axis: Axis) -> dict[str, Cut]:
    """Puts this rank's parts in the place of linears and norms; weights on the meta device stay there.

    Returns:
        The cuts of the parameters that were cut, by name: what a loader reads of each.

    Raises:
        StartupError: features that the ranks do not divide.
    """
    cuts: dict[str, Cut] = {}
    for name, layer in list(module.named_modules()):
        part = _part(name, layer, plan, axis)
        if part is None:
            continue
        replacement, cut_by_parameter = part
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, replacement)
        cuts |= {f"{name}.{parameter}": cut for parameter, cut in cut_by_parameter.items()}
    return cuts


def _part(name: str, layer: Any, plan: ModelPlan, axis: Axis) -> tuple[nn.Module, dict[str, Cut]] | None:
    if isinstance(layer, nn.Linear):
        gathered = matches(name, plan.gathered)
        if gathered and layer.out_features % axis.size:
            return None
        if gathered or matches(name, plan.column):
            cut = _cut(name, 0, layer.out_features, plan, axis)
            bias = None if layer.bias is None else held_part(layer.bias, cut)
            linear = ColumnLinear(held_part(layer.weight, cut), bias, axis, gathered)
            return linear, {"weight": cut} | ({} if bias is None else {"bias": cut})
        if matches(name, plan.row):
            cut = _cut(name, 1, layer.in_features, plan, axis)
            return RowLinear(held_part(layer.weight, cut), layer.bias, axis), {"weight": cut}
        if matches(name, plan.partial):
            unbiased: Any = layer.bias is None
            assert unbiased, f"{name} has a bias, which would be summed over the ranks"
            cut = _cut(name, 1, layer.in_features, plan, axis)
            return PartialLinear(held_part(layer.weight, cut)), {"weight": cut}
    elif matches(name, plan.summed):
        return SumOverRanks(axis), {}
    elif matches(name, plan.norms_across_heads):
        cut = _cut(name, 0, layer.weight.shape[0], plan, axis)
        return SpreadRMSNorm(held_part(layer.weight, cut), layer.eps, axis), {"weight": cut}
    return None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the globs fits a module's path."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def by_name(name: str, values: Mapping[str, T]) -> T | None:
    """The value of the first glob that fits a module's path."""
    return next((value for glob, value in values.items() if fnmatch.fnmatchcase(name, glob)), None)


def _cut(name: str, dim: int, features: int, plan: ModelPlan, axis: Axis) -> Cut:
    """Features made of segments are cut segment by segment: every rank holds its share of each."""
    ratio = by_name(name, plan.segments) or (1,)
    unit = features // sum(ratio)
    ranges, first = [], 0
    for part in ratio:
        check_features(axis.size, unit * part, name)
        share = unit * part // axis.size
        ranges.append((first + share * axis.rank, first + share * (axis.rank + 1)))
        first += unit * part
    return Cut(dim, tuple(ranges))


def held_part(weight: torch.Tensor, cut: Cut) -> nn.Parameter:
    """The part of a parameter that a rank holds."""
    # A copy: the whole weight must not stay alive behind a view.
    return nn.Parameter(cut.of(weight.data).clone(memory_format=torch.contiguous_format), requires_grad=False)
