"""A sequence over ranks: how streams are cut and joined, and attention across the pieces.

Ulysses (arXiv 2309.14509): one all-to-all turns pieces of the sequence with all heads into the whole sequence with a
piece of the heads, and one turns it back. Queries, keys and values travel packed in one. Heads that do not divide are
filled up with zeros; so are sequences, whose filling is taken out before attention. Ranks that write into each other's
memory do it all in one operator (`ulysses.py`). Ring (arXiv 2310.01889) is in `ring.py`. Shapes: B rows, L tokens of a
piece, n ranks, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from services.attention import Kernel, Streams, joined, taken_apart
from services.family import ModelPlan
from services.parallel.collectives import all_gather, all_to_all, peer_memory, plan_shown, plan_window
from services.parallel.mesh import Axis, Mesh
from services.parallel.ring import ring_attention
from services.parallel.ulysses import layout_of, ulysses_attention

# Texts have many lengths, and requests of several take turns.
KEPT_ORDERS = 256


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of joined pieces belong, for the forward in hand.

    Attributes:
        tokens: [K] positions of real tokens among all joined pieces, in the sequence's own order.
        back: [n L] for each joined place its index into `tokens`; filling takes any.
        lengths: [F] tokens of each joint field, on the CPU.
        ring_orders: for ring attention, places of each ring rank's piece, those of keys that count first, [n, B, L].
        ring_runs: from which place on those stand in a row, or -1, and how many there are, [n, B, 2] on the CPU.
    """

    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    back: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    lengths: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    ring_orders: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    ring_runs: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class SequenceParallel:
    """Cuts streams before the blocks, joins them after, and is what an `Attend` does across ranks in between.

    Attributes:
        places: of the streams that blocks run with; `cut` finds them.
    """

    def __init__(self, plan: ModelPlan, mesh: Mesh) -> None:
        self._plan = plan
        self._whole: Axis = mesh.sequence
        self._ulysses: Axis = mesh["ulysses"]
        self._ring: Axis = mesh["ring"]
        self.places = Places()
        # Ranks that write into each other's memory exchange heads inside one operator.
        self._at_once = self._ring.size == 1 and self._ulysses.name in peer_memory

    def cut(self, streams: Any) -> Any:
        """This rank's piece of every field that the plan says holds tokens."""
        self.places = self._find_places(streams)
        pieces = {}
        for tokens in self._plan.sequence:
            if tokens.holds(value := getattr(streams, tokens.field)):
                pieces[tokens.field] = _map(value, partial(own_piece, dim=tokens.dim, axis=self._whole))
        return replace(streams, **pieces)

    def join(self, piece: torch.Tensor, tokens: int) -> torch.Tensor:
        """Pieces [B, L, ...] of all ranks to the whole [B, tokens, ...]."""
        gathered: torch.Tensor = all_gather(piece, self._whole.name, self._whole.size)
        return gathered.transpose(0, 1).flatten(1, 2)[:, :tokens]

    def attend(
        self, kernel: Kernel, queries: Streams, keys: Streams, values: Streams, filling: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """[B, L, H, D] of this rank's tokens; `filling` [B] is in front of the whole sequence in its own order."""
        if self._at_once:
            axis, lengths = self._ulysses, self.places.lengths
            streams = [*queries, *keys, *values]
            return tuple(ulysses_attention(streams, lengths, filling, axis.name, axis.size, kernel.__name__))
        return taken_apart(self._attend(kernel, joined(queries), joined(keys), joined(values), filling), queries)

    def _attend(
        self, kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, filling: torch.Tensor | None
    ) -> torch.Tensor:
        if self._ulysses.size == 1:
            return self._across_ring(kernel, query, key, value)
        heads = query.shape[2]
        self._plan_windows(query)
        query, key, value = _scatter_heads(query, key, value, self._ulysses)
        if self._ring.size > 1:
            mixed = self._across_ring(kernel, query, key, value)
        else:
            tokens = self.places.tokens
            query, key, value = (tensor.index_select(1, tokens) for tensor in (query, key, value))
            mixed = kernel(query, key, value, filling).index_select(1, self.places.back)
        return _gather_heads(mixed, self._ulysses)[:, :, :heads]

    def _plan_windows(self, query: torch.Tensor) -> None:
        """In a dry run, those that GPUs which see each other's memory would have in the place of what follows."""
        if query.device.type != "meta":
            return
        rows, _, heads, width = query.shape
        axis = self._ulysses
        if self._ring.size > 1:
            plan_shown(axis.name, query[:, :, :1], 3 * axis.size * -(-heads // axis.size))
            return
        layout = layout_of(tuple(self.places.lengths.tolist()), axis.size, rows, heads)
        for use, size in zip(("attended", "returned"), layout.sizes, strict=True):
            plan_window(axis.name, use, size * width * query.element_size())

    def _across_ring(self, kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        orders, runs = self.places.ring_orders, self.places.ring_runs
        return ring_attention(query, key, value, orders, runs, self._ring.name, kernel.__name__)

    def _find_places(self, streams: Any) -> Places:
        """Joined pieces stand rank by rank, in each the fields of the joint sequence one after the other."""
        lengths = tuple(getattr(streams, field).shape[1] for field in self._plan.joint)
        filling = getattr(streams, "filling", None)
        if self._at_once:
            return Places(lengths=torch.tensor(lengths))
        if self._ring.size == 1:
            tokens, back = token_orders(lengths, self._whole.size, streams.hidden.device)
            return Places(tokens, back, lengths=torch.tensor(lengths))
        if filling is None or filling.is_meta:  # a dry run's has no values
            first: tuple[int, ...] = (0,) * streams.hidden.shape[0]
        else:
            first = tuple(filling.tolist())
        return ring_places(lengths, first, self._whole.size, self._ring.size, streams.hidden.device)


def own_piece(tensor: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    """This rank's of the equal pieces along `dim`; the last ranks' are filled up with zeros."""
    length = -(-tensor.shape[dim] // axis.size)
    start = min(length * axis.rank, tensor.shape[dim])
    piece = tensor.narrow(dim, start, min(length, tensor.shape[dim] - start))
    if missing := length - piece.shape[dim]:
        return F.pad(piece, (0, 0) * (tensor.ndim - 1 - dim) + (0, missing))
    # No view: compiled code tells offsets apart, and where they differ, some ranks alone would run eagerly. Collectives
    # that do not depend on each other may then come in another order than elsewhere.
    return piece.clone(memory_format=torch.contiguous_format)


def joined_order(lengths: Sequence[int], ranks: int) -> torch.Tensor:
    """[n L] position in the joint sequence of every joined place; -1 for filling."""
    pieces = []
    for rank in range(ranks):
        first = 0
        for length in lengths:
            share = -(-length // ranks)
            places = torch.arange(rank * share, (rank + 1) * share)
            pieces.append(torch.where(places < length, first + places, -1))
            first += length
    return torch.cat(pieces)


def real_tokens(order: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`Places.tokens` and `Places.back` of a joined order."""
    real = (order >= 0).nonzero()[:, 0]
    tokens = torch.empty(total, dtype=torch.int64)
    tokens[order[real]] = real
    return tokens, order.clamp(min=0)


@lru_cache(maxsize=KEPT_ORDERS)
def token_orders(lengths: tuple[int, ...], ranks: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`real_tokens` of fields of these lengths, on the device."""
    tokens, back = real_tokens(joined_order(lengths, ranks), sum(lengths))
    return tokens.to(device), back.to(device)


@lru_cache(maxsize=KEPT_ORDERS)
def ring_places(
    lengths: tuple[int, ...], filling: tuple[int, ...], ranks: int, ring: int, device: torch.device
) -> Places:
    """Those of fields of these lengths, over a ring of `ring` ranks among `ranks` with a piece of the sequence."""
    orders, runs = ring_keys(joined_order(lengths, ranks), torch.tensor(filling), ring)
    return Places(lengths=torch.tensor(lengths), ring_orders=orders.to(device), ring_runs=runs)


def ring_keys(order: torch.Tensor, filling: torch.Tensor, ring: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`Places.ring_orders` and `Places.ring_runs` of a joined order; `filling` [B] is in front of each row."""
    real = (order.to(filling.device) >= filling[:, None]).unflatten(1, (ring, -1)).transpose(0, 1)
    # A copy even of one row: compiled code tells strides apart that stand for nothing.
    orders = (~real).to(torch.uint8).argsort(dim=2, stable=True).clone(memory_format=torch.contiguous_format)
    counts = real.sum(dim=2)
    first, last = orders[:, :, 0], orders.gather(2, (counts - 1).clamp(min=0)[..., None])[..., 0]
    return orders, torch.stack((torch.where(last - first + 1 == counts, first, -1), counts), dim=2)


def _scatter_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, axis: Axis
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, L, H, D] each to [B, n L, H / n, D] each."""
    packed = torch.stack((query, key, value), dim=2)
    if missing := -query.shape[2] % axis.size:
        packed = F.pad(packed, (0, 0, 0, missing))
    # [B, L, 3, n, h, D]: the heads of rank i go to rank i.
    received: torch.Tensor = all_to_all(packed.unflatten(3, (axis.size, -1)).movedim(3, 0).contiguous(), axis.name)
    query, key, value = received.transpose(0, 1).flatten(1, 2).unbind(2)
    return query, key, value


def _gather_heads(mixed: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[B, n L, h, D] back to [B, L, n h, D]."""
    received: torch.Tensor = all_to_all(mixed.unflatten(1, (axis.size, -1)).movedim(1, 0).contiguous(), axis.name)
    return received.movedim(0, 2).flatten(2, 3)


def _map(value: Any, change: Any) -> Any:
    return tuple(change(item) for item in value) if isinstance(value, tuple) else change(value)
