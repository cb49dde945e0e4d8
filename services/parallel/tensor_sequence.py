"""Tensor parallelism with sequence-parallel regions (arXiv 2205.05198, section 4.2).

Between attention and feed-forwards a rank holds a piece of the tokens only, so norms, modulation and residuals are
spread as well. Where linears are cut by features, all tokens are gathered first; their sum over the ranks ends in a
scatter of tokens. Both together send what the sum alone would. In between, tokens lie as they do on one rank: in their
order and without filling, so attention knows nothing of it. Which modules gather and which scatter is data in the
`ModelPlan`. Shapes: B rows, S tokens, n ranks, L tokens of a piece, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from services.family import RESULT, ModelPlan
from services.parallel.collectives import all_gather, hold, plan_sent, plan_shown, reduce_scatter
from services.parallel.mesh import Axis
from services.parallel.sequence import own_piece, token_orders
from services.parallel.tensor import SumOverRanks, by_name, matches


class Layout:
    """Fields of the streams side by side: a rank holds a piece of each, the last ranks' filled up.

    Attributes:
        lengths: tokens of the whole fields.
    """

    def __init__(self, fields: tuple[str, ...], axis: Axis) -> None:
        self._fields, self._axis = fields, axis
        self.lengths: tuple[int, ...] = ()
        # Tensors and no numbers: compiled code takes their sizes as they come.
        self._tokens = self._places = torch.empty(0)

    def fit(self, streams: Any) -> None:
        """Before a forward, whose streams are still whole."""
        self.lengths = tuple(getattr(streams, field).shape[1] for field in self._fields)
        self._tokens, self._places = token_orders(self.lengths, self._axis.size, streams.hidden.device)

    def gather(self, piece: torch.Tensor) -> torch.Tensor:
        """Pieces [B, L, ...] of all ranks to the whole [B, S, ...]."""
        axis = self._axis
        whole: torch.Tensor = gather_tokens(piece, self._tokens, len(self._fields) == 1, axis.name, axis.size)
        return whole

    def scatter(self, part: torch.Tensor) -> torch.Tensor:
        """All ranks' parts [B, S, ...] to this rank's piece [B, L, ...] of their sum."""
        axis = self._axis
        piece: torch.Tensor = scatter_tokens(part, self._places, len(self._fields) == 1, axis.name, axis.size)
        return piece


class OwnTokens(nn.Module):
    """What every rank has whole, [B, S, ...], to this rank's piece [B, L, ...]."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self._axis = axis

    def forward(self, whole: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return own_piece(whole, 1, self._axis)


class TensorSequence:
    """Cuts streams before the blocks, joins them after, and lets modules gather and scatter in between."""

    def __init__(self, plan: ModelPlan, axis: Axis) -> None:
        self._region, self._axis = plan.region, axis
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._forwards: dict[type, Callable[..., Any]] = {}
        self._hidden = self._layout(("hidden",))

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of the whole fields of each layout, in the forward in hand."""
        return tuple(layout.lengths for layout in self._layouts.values())

    def apply(self, module: nn.Module) -> None:
        """Acts on a module whose linears are cut."""
        for name, part in list(module.named_modules()):
            if isinstance(part, SumOverRanks):
                fields = by_name(name, self._region.scatters)
                assert fields, f"the plan does not say which tokens {name} sums"
                part.tokens = self._layout(fields)
            elif gathers := by_name(name, self._region.gathers):
                self._gather(part, {value: self._layout(fields) for value, fields in gathers.items()})
            elif matches(name, self._region.pieces):
                parent, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(parent), attribute, OwnTokens(self._axis))

    def _gather(self, part: Any, whole: Mapping[str, Layout]) -> None:
        # One function for all modules of a class, for the same reason as one layout.
        cls: Any = type(part)
        forward = self._forwards.setdefault(cls, _gathering(cls.forward))
        part.whole, part.forward = whole, MethodType(forward, part)

    def fit(self, streams: Any) -> None:
        """Makes ready for blocks with these streams, of which no piece has been cut yet."""
        for layout in self._layouts.values():
            layout.fit(streams)

    def cut(self, streams: Any) -> Any:
        """This rank's piece of the fields that the region reads token by token."""
        self.fit(streams)
        pieces = {
            tokens.field: own_piece(getattr(streams, tokens.field), tokens.dim, self._axis)
            for tokens in self._region.fields
            if tokens.holds(getattr(streams, tokens.field))
        }
        return replace(streams, **pieces)

    def join(self, hidden: torch.Tensor) -> torch.Tensor:
        """Pieces [B, L, D] of all ranks to the whole [B, S, D]."""
        return self._hidden.gather(hidden)

    def _layout(self, fields: tuple[str, ...]) -> Layout:
        # One object for all blocks, so that they share compiled code.
        return self._layouts.setdefault(fields, Layout(fields, self._axis))


def _gathering(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A class's forward, with the inputs (by name) or the first result whole that a module's `whole` says."""
    places = {name: place for place, name in enumerate(list(inspect.signature(forward).parameters)[1:])}

    def gathering(part: Any, *arguments: Any, **named: Any) -> Any:
        by_place = list(arguments)
        for name, layout in part.whole.items():
            if name in named:
                named[name] = layout.gather(named[name])
            elif name != RESULT:
                by_place[places[name]] = layout.gather(by_place[places[name]])
        made = forward(part, *by_place, **named)
        return (part.whole[RESULT].gather(made[0]), *made[1:]) if RESULT in part.whole else made

    return gathering


@torch.library.custom_op("lightloom::gather_tokens", mutates_args=())
def gather_tokens(piece: torch.Tensor, tokens: torch.Tensor, in_order: bool, group: str, size: int) -> torch.Tensor:
    """Pieces [B, L, ...] of all ranks to the whole [B, S, ...].

    Args:
        tokens: [S] of each token its place among the joined pieces.
        in_order: whether those are 0, 1, ..., so that only filling at the end has to go.
    """
    hold(tokens, group)
    gathered: torch.Tensor = all_gather(piece, group, size)
    joined = gathered.transpose(0, 1).flatten(1, 2)
    return joined[:, : len(tokens)].contiguous() if in_order else joined.index_select(1, tokens)


@gather_tokens.register_fake
def _(piece: torch.Tensor, tokens: torch.Tensor, in_order: bool, group: str, size: int) -> torch.Tensor:
    plan_sent("all_gather", piece, size - 1)
    plan_shown(group, piece)
    return piece.new_empty((piece.shape[0], tokens.shape[0], *piece.shape[2:]))


@torch.library.custom_op("lightloom::scatter_tokens", mutates_args=())
def scatter_tokens(part: torch.Tensor, places: torch.Tensor, in_order: bool, group: str, size: int) -> torch.Tensor:
    """Each rank's part [B, S, ...] to its piece [B, L, ...] of their sum.

    Args:
        places: [n L] of each place among the joined pieces its token; filling takes any.
        in_order: whether those are 0, 1, ...
    """
    hold(places, group)
    if not in_order:
        part = part.index_select(1, places)
    elif filling := len(places) - part.shape[1]:
        part = F.pad(part, (0, 0) * (part.ndim - 2) + (0, filling))
    piece: torch.Tensor = reduce_scatter(part.unflatten(1, (size, -1)).transpose(0, 1), group)
    return piece


@scatter_tokens.register_fake
def _(part: torch.Tensor, places: torch.Tensor, in_order: bool, group: str, size: int) -> torch.Tensor:
    piece = part.new_empty((part.shape[0], places.shape[0] // size, *part.shape[2:]))
    plan_sent("reduce_scatter", piece, size - 1)
    plan_shown(group, piece, size)
    return piece
