"""Ulysses attention (arXiv 2309.14509) for GPUs that read and write each other's memory, as one operator.

Every rank has a piece of each field of the sequence (text, image) with all heads. Portion by portion - a row, and in
long sequences some of a row's heads - it writes the heads of another rank straight to where that rank attends over the
whole sequence, in the sequence's own order and without filling; what was attended to goes back the same way. The first
portion is written by a kernel, since all wait for it, and in a long sequence it is a small one; copy engines carry the
others while the one before is attended to. Shapes: B rows, F fields, L tokens of a rank's pieces, S of the whole
sequence, n ranks, H heads, h of them a rank's in one portion, W words in a head's width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from services.attention import KERNELS
from services.parallel.collectives import count_sent, peer_memory
from services.parallel.copies import copy_heads, copy_rows, word_of
from services.parallel.peer_memory import PeerMemory, Window

# In sequences of so many tokens a rank attends to a tenth of its heads first, while the others arrive, and to one head
# last, while what it mixed of the others goes back. Few portions leave few multiprocessors idle at their ends.
LONG_TOKENS, FIRST_SHARE = 8192, 10


@torch.library.custom_op("lightloom::ulysses_attention", mutates_args=())
def ulysses_attention(
    streams: Sequence[torch.Tensor],
    lengths: torch.Tensor,
    filling: torch.Tensor | None,
    group: str,
    size: int,
    kernel: str,
) -> list[torch.Tensor]:
    """Queries, keys and values [B, l, H, D] of this rank's tokens to the same of mixed values.

    Args:
        streams: of the queries, each of which holds one field or several, then of the keys, then of the values.
        lengths: [F] tokens of the whole fields, on the CPU.
        filling: as a `Kernel` takes it, in front of the whole sequence.
        kernel: name of a kernel of `services/attention.py`.
    """
    exchange = Exchange(peer_memory[group], size, lengths.tolist(), streams[0])
    return exchange.attend(streams, filling.tolist() if filling is not None else None, kernel)


@ulysses_attention.register_fake
def _(
    streams: Sequence[torch.Tensor],
    lengths: torch.Tensor,
    filling: torch.Tensor | None,
    group: str,
    size: int,
    kernel: str,
) -> list[torch.Tensor]:
    return [torch.empty_like(query, memory_format=torch.contiguous_format) for query in streams[: len(streams) // 3]]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one rank's piece of a field is: `real` tokens from `piece` on in the pieces, from `whole` on in the whole.

    The last rank's piece is filled up to the others' `length`.
    """

    piece: int
    whole: int
    real: int
    length: int


@dataclass(frozen=True, slots=True)
class Portion:
    """What is sent and attended to at once: one row, and of each rank some heads."""

    row: int
    heads: tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Who has what, and where in the windows; the same for every block of a model.

    One window holds for each portion what is attended to, another for each portion what comes back from every rank. So
    a rank that is ahead may write what is to be attended to next while others still take what came back, whatever the
    next layout is.

    Attributes:
        slots: by rank and field.
        before: heads in the portions before each, and in all, of the rank that has the most.
        total: S; length: L.
    """

    slots: tuple[tuple[Slot, ...], ...]
    portions: tuple[Portion, ...]
    before: tuple[int, ...]
    total: int
    length: int

    def attended(self, portion: int) -> int:
        """Where a portion begins, in heads' widths from the start of its window."""
        return 3 * self.total * self.before[portion]

    def returned(self, portion: int, rank: int) -> int:
        """The same of what a rank gives back."""
        heads = len(self.slots) * self.before[portion]
        if portion < len(self.portions):
            heads += rank * (self.before[portion + 1] - self.before[portion])
        return self.length * heads

    @property
    def sizes(self) -> tuple[int, int]:
        """Of the windows, in heads' widths."""
        return self.attended(len(self.portions)), self.returned(len(self.portions), 0)


@lru_cache(maxsize=64)
def layout_of(lengths: tuple[int, ...], ranks: int, rows: int, heads: int) -> Layout:
    """The layout for fields of these lengths."""
    slots = tuple(tuple(slots_of(lengths, ranks, rank)) for rank in range(ranks))
    share, total = -(-heads // ranks), sum(lengths)
    portions, before = [], [0]
    for row in range(rows):
        for turn in turns_of(share, first=row == 0, last=row == rows - 1) if total >= LONG_TOKENS else [range(share)]:
            own = (range(heads)[share * rank :][turn.start : turn.stop] for rank in range(ranks))
            portions.append(Portion(row, tuple(slice(part.start, part.stop) for part in own)))
            before.append(before[-1] + len(turn))
    return Layout(slots, tuple(portions), tuple(before), total, sum(slot.length for slot in slots[0]))


def slots_of(lengths: Sequence[int], ranks: int, rank: int) -> list[Slot]:
    """A rank's pieces of fields of these lengths."""
    slots, piece, first = [], 0, 0
    for length in lengths:
        share = -(-length // ranks)
        start = min(share * rank, length)
        slots.append(Slot(piece, first + start, min(share, length - start), share))
        piece, first = piece + share, first + length
    return slots


def turns_of(share: int, *, first: bool, last: bool) -> list[range]:
    """The heads of a long row turn by turn, of which a rank has at most `share`."""
    begin = -(-share // FIRST_SHARE) if first else 0
    end = share - 1 if last else share
    cuts = sorted({0, begin, max(begin, end), share})
    return [range(start, stop) for start, stop in pairwise(cuts)]


class Exchange:
    """One call.

    Args:
        lengths: tokens of the whole fields.
        like: any of this rank's queries.
    """

    def __init__(self, peers: PeerMemory, ranks: int, lengths: Sequence[int], like: torch.Tensor) -> None:
        rows, _, heads, width = like.shape
        self._peers, self._rank, self._dtype = peers, peers.rank, like.dtype
        self._layout = layout_of(tuple(lengths), ranks, rows, heads)
        self._others = [rank for rank in range(ranks) if rank != peers.rank]
        self._word = word_of(width * like.element_size())
        self._width = width * like.element_size() // self._word.itemsize
        attended, returned = (size * self._width for size in self._layout.sizes)
        self._window: Window = peers.window("attended", attended * self._word.itemsize)
        back = peers.window("returned", returned * self._word.itemsize)
        self._to_attend = [self._window.of(rank, (attended,), self._word) for rank in range(ranks)]
        self._given_back = [back.of(rank, (returned,), self._word) for rank in range(ranks)]

    def attend(self, streams: Sequence[torch.Tensor], filling: Sequence[int] | None, kernel: str) -> list[torch.Tensor]:
        """See `ulysses_attention`."""
        lengths = [slot.length for slot in self._layout.slots[self._rank]]
        count = len(streams) // 3
        outputs = [torch.empty_like(query, memory_format=torch.contiguous_format) for query in streams[:count]]
        words = [stream.view(self._word) for stream in (*streams, *outputs)]
        *sent, taken = (fields_of(words[first : first + count], lengths) for first in range(0, 4 * count, count))
        fields = list(zip(*sent, strict=True))
        self._scatter(fields)
        self._window.meet()
        # Only now: what meets crosses the same link, and would wait behind all that copy engines have to carry.
        arrivals = [self._send(index, fields) for index in range(len(self._layout.portions))]
        # All are kept to the end: their memory must not be used again while copies read it.
        mixed: list[torch.Tensor] = []
        for index, portion in enumerate(self._layout.portions):
            if index:
                self._peers.wait(arrivals[index])
                self._window.meet()
                self._give_back(index - 1, mixed[-1])
            mixed.append(self._mix(index, portion, filling[portion.row] if filling else 0, kernel))
            self._take(portion.row, portion.heads[self._rank], mixed[-1], taken, whole=True)
        self._peers.wait(self._give_back(len(arrivals) - 1, mixed[-1]))
        self._window.meet()
        self._collect(taken)
        return outputs

    def _scatter(self, fields: Sequence[tuple[torch.Tensor, ...]]) -> None:
        """The first portion to all ranks."""
        portion = self._layout.portions[0]
        for slot, field in zip(self._layout.slots[self._rank], fields, strict=True):
            places = [self._places(rank, 0, slot) for rank in range(len(portion.heads))]
            copy_heads([tensor[portion.row, : slot.real] for tensor in field], places, portion.heads)
            for rank in self._others:
                count_sent("all_to_all", places[rank])

    def _send(self, index: int, fields: Sequence[tuple[torch.Tensor, ...]]) -> torch.Event | None:
        """Another portion to all ranks; returns when it will be there."""
        portion = self._layout.portions[index]
        with self._peers.aside():
            # This rank's own heads last: they have the shorter way.
            for rank in (*self._others, self._rank) if index else ():
                heads = portion.heads[rank]
                for slot, field in zip(self._layout.slots[self._rank], fields, strict=True):
                    places = self._places(rank, index, slot)
                    for kind, tensor in enumerate(field):
                        copy_rows(tensor[portion.row, : slot.real, heads], places[:, kind])
                    if rank != self._rank:
                        count_sent("all_to_all", places)
            return self._peers.mark()

    def _places(self, rank: int, index: int, slot: Slot) -> torch.Tensor:
        """Where a rank attends to this one's tokens of a field: [real, 3, h, W]."""
        attended = self._attended(rank, index, self._layout.portions[index].heads[rank])
        return attended[slot.whole : slot.whole + slot.real]

    def _mix(self, index: int, portion: Portion, filling: int, kernel: str) -> torch.Tensor:
        """Attention over the whole sequence with this rank's heads, [S, h, W]."""
        attended = self._attended(self._rank, index, portion.heads[self._rank])
        if not attended.shape[2]:
            return attended[:, 0]
        query, key, value = attended.view(self._dtype)[None].unbind(2)
        mixed = KERNELS[kernel](query, key[:, filling:], value[:, filling:], None)
        return mixed[0].contiguous().view(self._word)

    def _give_back(self, index: int, mixed: torch.Tensor) -> torch.Event | None:
        """The others' tokens to them; returns when they will be there."""
        with self._peers.aside():
            for rank in self._others:
                target = self._returned(rank, index, self._rank, mixed.shape[1])
                for slot in self._layout.slots[rank]:
                    tokens = mixed[slot.whole : slot.whole + slot.real]
                    count_sent("all_to_all", tokens)
                    target[slot.piece : slot.piece + slot.real].copy_(tokens)
            return self._peers.mark()

    def _collect(self, fields: Sequence[torch.Tensor]) -> None:
        """What the others gave back, into fields [B, l, H, W]; filling is 0."""
        for slot, output in zip(self._layout.slots[self._rank], fields, strict=True):
            if slot.real < slot.length:
                output[:, slot.real :] = 0
        for index, portion in enumerate(self._layout.portions):
            for rank in self._others:
                heads = portion.heads[rank]
                mixed = self._returned(self._rank, index, rank, heads.stop - heads.start)
                self._take(portion.row, heads, mixed, fields, whole=False)

    def _take(
        self, row: int, heads: slice, mixed: torch.Tensor, fields: Sequence[torch.Tensor], *, whole: bool
    ) -> None:
        """This rank's tokens with some heads, out of the whole sequence or out of its pieces."""
        for slot, output in zip(self._layout.slots[self._rank], fields, strict=True):
            first = slot.whole if whole else slot.piece
            output[row, : slot.real, heads] = mixed[first : first + slot.real]

    def _attended(self, rank: int, portion: int, heads: slice) -> torch.Tensor:
        """Where a rank attends to a portion: queries, keys and values, [S, 3, h, W]."""
        shape = (self._layout.total, 3, heads.stop - heads.start, self._width)
        return self._view(self._to_attend[rank], self._layout.attended(portion), shape)

    def _returned(self, rank: int, portion: int, of: int, heads: int) -> torch.Tensor:
        """Where a rank takes back what rank `of` mixed: [L, h, W]."""
        shape = (self._layout.length, heads, self._width)
        return self._view(self._given_back[rank], self._layout.returned(portion, of), shape)

    def _view(self, memory: torch.Tensor, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        first *= self._width
        return memory[first : first + math.prod(shape)].view(shape)


def fields_of(streams: Sequence[torch.Tensor], pieces: Sequence[int]) -> list[torch.Tensor]:
    """Streams [B, l, ...] taken apart into fields of these lengths, of which a stream holds one or several."""
    fields: list[torch.Tensor] = []
    rest = list(streams)
    for length in pieces:
        while not rest[0].shape[1]:
            rest.pop(0)
        fields.append(rest[0][:, :length])
        rest[0] = rest[0][:, length:]
    return fields
