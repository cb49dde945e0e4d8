"""Ulysses attention (arXiv 2309.14509) for GPUs that read and write each other's memory, as one operator.

Every rank has a piece of each field of the sequence (text, image) with all heads. Row by row, and in long sequences
some heads after the others, it writes the heads of another rank straight to where that rank attends over the whole
sequence, in the sequence's own order and without filling; what was attended to goes back the same way. While one turn
is attended to, the next one's heads and the last one's results are under way. Shapes: B rows, F fields, L tokens of a
rank's pieces, S of the whole sequence, n ranks, H heads, h of them a rank's in one turn, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from services.attention import KERNELS
from services.parallel.collectives import count_sent, peer_memory
from services.parallel.peer_memory import PeerMemory, Window

# Sequences of so many tokens are attended to in so many turns: in fewer, nothing would go on beside the first sending;
# shorter ones would leave multiprocessors idle in each.
LONG_TOKENS, TURNS = 8192, 4
# 16, 8, 4, 2 and 1 bytes.
WORDS = (torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8)


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


def slots_of(lengths: Sequence[int], ranks: int, rank: int) -> list[Slot]:
    """A rank's pieces of fields of these lengths."""
    slots, piece, first = [], 0, 0
    for length in lengths:
        share = -(-length // ranks)
        start = min(share * rank, length)
        slots.append(Slot(piece, first + start, min(share, length - start), share))
        piece, first = piece + share, first + length
    return slots


class Exchange:
    """One call. It moves numbers in words as wide as they allow: copies then take fewer and larger steps.

    Args:
        lengths: tokens of the whole fields.
        like: any of this rank's queries.
    """

    def __init__(self, peers: PeerMemory, ranks: int, lengths: Sequence[int], like: torch.Tensor) -> None:
        self._peers, self._rank, self._ranks = peers, peers.rank, ranks
        self._dtype, self._word = like.dtype, _word(like.shape[-1] * like.element_size())
        self._rows, _, heads, width = like.shape
        self._width = width * like.element_size() // self._word.itemsize
        self._slots = [slots_of(lengths, ranks, rank) for rank in range(ranks)]
        self._total = sum(lengths)
        self._length = sum(slot.length for slot in self._slots[0])
        share = -(-heads // ranks)
        turns = max(1, min(share, TURNS // self._rows)) if self._total >= LONG_TOKENS else 1
        self._heads = [turns_of(range(heads)[share * rank : share * (rank + 1)], share, turns) for rank in range(ranks)]
        self._turns = range(len(self._heads[0]))
        # A window holds for each turn what is attended to, then what comes back from every rank.
        self._attended_words = 3 * self._rows * self._total * -(-share // turns) * self._width
        self._returned_words = self._rows * self._length * -(-share // turns) * self._width
        words = len(self._turns) * (self._attended_words + ranks * self._returned_words)
        self._window: Window = peers.window(words * self._word.itemsize)
        self._memory = [self._window.of(rank, (words,), self._word) for rank in range(ranks)]

    def attend(self, streams: Sequence[torch.Tensor], filling: Sequence[int] | None, kernel: str) -> list[torch.Tensor]:
        """See `ulysses_attention`."""
        lengths = [slot.length for slot in self._slots[self._rank]]
        count = len(streams) // 3
        outputs = [torch.empty_like(query, memory_format=torch.contiguous_format) for query in streams[:count]]
        words = [stream.view(self._word) for stream in (*streams, *outputs)]
        kinds = [fields_of(words[first : first + count], lengths) for first in range(0, 4 * count, count)]
        *sent, taken = kinds
        triples = list(zip(*sent, strict=True))
        there: list[torch.Event | None] = []
        for turn in self._turns:
            there += self._scatter(turn, triples)
            self._keep(turn, triples)
        back = []
        for (turn, row), arrived in zip(product(self._turns, range(self._rows)), there, strict=True):
            self._peers.wait(arrived)
            self._window.meet()
            mixed = self._mix(turn, row, filling[row] if filling else 0, kernel)
            back.append(self._give_back(turn, row, mixed))
            for slot, output in zip(self._slots[self._rank], taken, strict=True):
                output[row, : slot.real, self._heads[self._rank][turn]] = mixed[slot.whole : slot.whole + slot.real]
        self._peers.wait(back[-1])
        self._window.meet()
        self._collect(taken)
        return outputs

    def _scatter(self, turn: int, triples: Sequence[tuple[torch.Tensor, ...]]) -> list[torch.Event | None]:
        """The others' heads to them, row by row; returns when each row will be there."""
        slots = self._slots[self._rank]
        packed: dict[int, torch.Tensor] = {}
        for rank, turns in enumerate(self._heads):
            if rank == self._rank:
                continue
            heads = turns[turn]
            shape = (self._rows, self._length, 3, heads.stop - heads.start, self._width)
            packed[rank] = triples[0][0].new_empty(shape)
            for slot, triple in zip(slots, triples, strict=True):
                part = packed[rank][:, slot.piece : slot.piece + slot.length]
                torch.stack([tensor[:, :, heads] for tensor in triple], dim=2, out=part)
            count_sent("all_to_all", packed[rank])
        there = []
        with self._peers.aside():
            for row in range(self._rows):
                for rank, pieces in packed.items():
                    target = self._attended(rank, turn)[row]
                    for slot in slots:
                        # Contiguous on both sides: copy engines take it, and no multiprocessor.
                        mine = pieces[row, slot.piece : slot.piece + slot.real]
                        target[slot.whole : slot.whole + slot.real].copy_(mine)
                there.append(self._peers.mark())
        return there

    def _keep(self, turn: int, triples: Sequence[tuple[torch.Tensor, ...]]) -> None:
        """This rank's own heads of its own tokens."""
        heads, target = self._heads[self._rank][turn], self._attended(self._rank, turn)
        for slot, triple in zip(self._slots[self._rank], triples, strict=True):
            own = [tensor[:, : slot.real, heads] for tensor in triple]
            torch.stack(own, dim=2, out=target[:, slot.whole : slot.whole + slot.real])

    def _mix(self, turn: int, row: int, filling: int, kernel: str) -> torch.Tensor:
        """Attention over the whole sequence with this rank's heads, [S, h, D]."""
        attended = self._attended(self._rank, turn)[row : row + 1]
        if not attended.shape[3]:
            return attended[0, :, 0]
        query, key, value = attended.view(self._dtype).unbind(2)
        mixed = KERNELS[kernel](query, key[:, filling:], value[:, filling:], None)
        return mixed[0].contiguous().view(self._word)

    def _give_back(self, turn: int, row: int, mixed: torch.Tensor) -> torch.Event | None:
        """The others' tokens of a row to them; returns when they will be there."""
        with self._peers.aside():
            for rank, slots in enumerate(self._slots):
                if rank == self._rank:
                    continue
                target = self._returned(rank, self._rank, turn)[row]
                count_sent("all_to_all", target)
                for slot in slots:
                    tokens = mixed[slot.whole : slot.whole + slot.real]
                    target[slot.piece : slot.piece + slot.real].copy_(tokens)
            return self._peers.mark()

    def _collect(self, outputs: Sequence[torch.Tensor]) -> None:
        """What the others gave back, into fields [B, l, H, D]; filling is 0."""
        for slot, output in zip(self._slots[self._rank], outputs, strict=True):
            if slot.real < slot.length:
                output[:, slot.real :] = 0
            for rank, turn in product(range(self._ranks), self._turns):
                if rank != self._rank:
                    mixed = self._returned(self._rank, rank, turn)
                    output[:, : slot.real, self._heads[rank][turn]] = mixed[:, slot.piece : slot.piece + slot.real]

    def _attended(self, rank: int, turn: int) -> torch.Tensor:
        """Where a rank attends: queries, keys and values of its heads, [B, S, 3, h, D]."""
        heads, first = self._heads[rank][turn], turn * self._attended_words
        return self._view(rank, first, (self._rows, self._total, 3, heads.stop - heads.start, self._width))

    def _returned(self, rank: int, of: int, turn: int) -> torch.Tensor:
        """Where a rank takes back what rank `of` mixed with its heads: [B, L, h, D]."""
        heads, place = self._heads[of][turn], of * len(self._turns) + turn
        first = len(self._turns) * self._attended_words + place * self._returned_words
        return self._view(rank, first, (self._rows, self._length, heads.stop - heads.start, self._width))

    def _view(self, rank: int, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        return self._memory[rank][first : first + math.prod(shape)].view(shape)


def turns_of(heads: range, share: int, turns: int) -> list[slice]:
    """A rank's heads turn by turn. All ranks have the same turns; those of a rank with fewer heads than `share`, which
    is the most that one has, may be empty."""
    length = -(-share // turns)
    parts = [heads[first : first + length] for first in range(0, share, length)]
    return [slice(part.start, part.stop) for part in parts]


def _word(size: int) -> torch.dtype:
    """The widest type of which `size` bytes are a multiple."""
    return next(word for word in WORDS if size % word.itemsize == 0)


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
