"""Ulysses attention (arXiv 2309.14509) for GPUs that read and write each other's memory, as one operator.

Every rank has a piece of each field of the sequence (text, image) with all heads. Row by row, it writes the heads of
another rank straight to where that rank attends over the whole sequence, in the sequence's own order and without
filling; what was attended to goes back the same way. While one row is attended to, the next one's heads and the last
one's results are under way. Shapes: B rows, F fields, L tokens of a rank's pieces, S of the whole sequence, n ranks,
H heads, h of them a rank's, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from services.attention import KERNELS
from services.parallel.collectives import count_sent, peer_memory
from services.parallel.peer_memory import PeerMemory, Window


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
    """One call.

    Args:
        like: any of this rank's queries.
    """

    def __init__(self, peers: PeerMemory, ranks: int, lengths: Sequence[int], like: torch.Tensor) -> None:
        self._peers, self._rank, self._ranks = peers, peers.rank, ranks
        self._rows, _, self._heads, self._width = like.shape
        self._slots = [slots_of(lengths, ranks, rank) for rank in range(ranks)]
        self._total = sum(lengths)
        self._length = sum(slot.length for slot in self._slots[0])
        share = -(-self._heads // ranks)
        starts = [min(share * rank, self._heads) for rank in range(ranks + 1)]
        self._own_heads = [slice(start, end) for start, end in zip(starts, starts[1:], strict=False)]
        # A window holds for every row what is attended to, then what comes back from every rank.
        self._row_in, self._row_out = 3 * self._total * share * self._width, ranks * self._length * share * self._width
        numbers = self._rows * (self._row_in + self._row_out)
        self._window: Window = peers.window(numbers * like.element_size())
        self._flat = [self._window.of(rank, (numbers,), like.dtype) for rank in range(ranks)]

    def attend(self, streams: Sequence[torch.Tensor], filling: Sequence[int] | None, kernel: str) -> list[torch.Tensor]:
        """See `ulysses_attention`."""
        pieces = [slot.length for slot in self._slots[self._rank]]
        count = len(streams) // 3
        kinds = [fields_of(streams[first : first + count], pieces) for first in (0, count, 2 * count)]
        triples = list(zip(*kinds, strict=True))
        there = [self._scatter(row, triples) for row in range(self._rows)]
        back = []
        for row, arrived in enumerate(there):
            self._peers.wait(arrived)
            self._window.meet()
            back.append(self._give_back(row, self._mix(row, filling[row] if filling else 0, kernel)))
        outputs = [torch.empty_like(query, memory_format=torch.contiguous_format) for query in streams[:count]]
        for arrived in back:
            self._peers.wait(arrived)
        self._window.meet()
        self._collect(fields_of(outputs, pieces))
        return outputs

    def _scatter(self, row: int, triples: Sequence[tuple[torch.Tensor, ...]]) -> Any:
        """A row's queries, keys and values to the ranks of their heads."""
        slots = self._slots[self._rank]
        for rank, heads in enumerate(self._own_heads):
            target = self._attended(rank, row)
            if rank == self._rank:
                for slot, triple in zip(slots, triples, strict=True):
                    own = [tensor[row, : slot.real, heads] for tensor in triple]
                    torch.stack(own, out=target[:, slot.whole : slot.whole + slot.real])
                continue
            packed = target.new_empty((3, self._length, *target.shape[2:]))
            for slot, triple in zip(slots, triples, strict=True):
                sent = [tensor[row, :, heads] for tensor in triple]
                torch.stack(sent, out=packed[:, slot.piece : slot.piece + slot.length])
            count_sent("all_to_all", packed)
            with self._aside():
                for slot in slots:
                    # One by one they are contiguous, so that copy engines take them and no multiprocessor does.
                    for part in range(3):
                        mine = packed[part, slot.piece : slot.piece + slot.real]
                        target[part, slot.whole : slot.whole + slot.real].copy_(mine)
        return self._peers.mark()

    def _mix(self, row: int, filling: int, kernel: str) -> torch.Tensor:
        """Attention over the whole sequence with this rank's heads, [S, h, D]."""
        query, key, value = self._attended(self._rank, row)[:, None]
        mixed: torch.Tensor = query
        if query.shape[2]:
            mixed = KERNELS[kernel](query, key[:, filling:], value[:, filling:], None)
        return mixed[0].contiguous()

    def _give_back(self, row: int, mixed: torch.Tensor) -> Any:
        """Every rank's tokens of a row to that rank."""
        for rank, slots in enumerate(self._slots):
            target = self._returned(rank, row, self._rank)
            if rank != self._rank:
                count_sent("all_to_all", target)
            with self._aside() if rank != self._rank else nullcontext():
                for slot in slots:
                    tokens = mixed[slot.whole : slot.whole + slot.real]
                    target[slot.piece : slot.piece + slot.real].copy_(tokens)
        return self._peers.mark()

    def _collect(self, outputs: Sequence[torch.Tensor]) -> None:
        """What all ranks gave back, into fields [B, l, H, D]; filling is 0."""
        for slot, output in zip(self._slots[self._rank], outputs, strict=True):
            output[:, slot.real :] = 0
            for rank, heads in enumerate(self._own_heads):
                for row in range(self._rows):
                    mixed = self._returned(self._rank, row, rank)
                    output[row, : slot.real, heads] = mixed[slot.piece : slot.piece + slot.real]

    def _attended(self, rank: int, row: int) -> torch.Tensor:
        """Where a rank attends to a row: [3, S, h, D] of its heads."""
        heads = self._own_heads[rank]
        shape = (3, self._total, heads.stop - heads.start, self._width)
        return self._view(rank, row * self._row_in, shape)

    def _returned(self, rank: int, row: int, of: int) -> torch.Tensor:
        """Where a rank takes back a row's values of rank `of`'s heads: [L, h, D]."""
        heads = self._own_heads[of]
        first = self._rows * self._row_in + row * self._row_out + of * (self._row_out // self._ranks)
        return self._view(rank, first, (self._length, heads.stop - heads.start, self._width))

    def _view(self, rank: int, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return self._flat[rank][first : first + count].view(shape)

    def _aside(self) -> AbstractContextManager[Any]:
        return self._peers.aside()


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
