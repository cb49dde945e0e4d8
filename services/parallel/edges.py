"""Edges of pieces of pictures to the neighbours' rooms by one kernel, for ranks whose GPUs see each other's memory.

Every rank has an inbox that its neighbours write, twice: exchanges take turns. A rank begins an exchange when its last
one is over, for which each neighbour had begun that one too, and so had read all that came for the one before: what
lies in the inbox of that turn may be overwritten. So no barrier is needed beside the flags of the exchange itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.parallel.copies import word_of
from services.parallel.peer_memory import PeerMemory, rounded


def channels_last(room: torch.Tensor) -> bool:
    """Whether a frame's pixels lie one after the other, each with its channels."""
    channels, width = room.shape[1], room.shape[-1]
    return room.stride(1) == 1 and room.stride(-1) == channels and room.stride(-2) == width * channels


@dataclass(slots=True)
class Edges:
    """Where edges lie in a room [B, C, (F,) H, W] with the channels last, in words.

    Attributes:
        word: numbers are moved in; item: of how many bytes.
        lines: frames, height, and strides of pictures, frames and lines: of each line (dimension -1 is cut) or frame
            (-2), an edge is one run of words.
        before, behind: words of a run; count_before, count_behind: of all runs.
        last, behind_at: where the last of the own piece begins, which goes to the rank behind, and what comes from
            there.
    """

    word: torch.dtype
    lines: tuple[int, int, int, int, int]
    before: int
    behind: int
    count_before: int
    count_behind: int
    last: int
    behind_at: int

    @classmethod
    def of(cls, room: torch.Tensor, dim: int, before: int, behind: int) -> Edges:
        """See `fill_halo`."""
        word = word_of(room.shape[1] * room.element_size())
        numbers = word.itemsize // room.element_size()
        frames, frame_stride = (room.shape[2], room.stride(2)) if room.ndim == 5 else (1, 0)
        height, line_stride = (room.shape[-2], room.stride(-2)) if dim == -1 else (1, 0)
        batch_stride, frame_stride, line_stride = (
            stride // numbers for stride in (room.stride(0), frame_stride, line_stride)
        )
        lines = (frames, height, batch_stride, frame_stride, line_stride)
        row, runs = room.stride(dim) // numbers, room.shape[0] * frames * height
        rows = room.shape[dim] - before - behind
        runs_of = (before * row, behind * row, runs * before * row, runs * behind * row)
        return cls(word, lines, *runs_of, rows * row, (before + rows) * row)


class PeerEdges:
    """The inboxes of one rank's neighbours, and its own. All ranks fill rooms in the same order.

    Args:
        peers: whose memory the inboxes are made in.
    """

    def __init__(self, peers: PeerMemory) -> None:
        self._peers = peers
        self._memory: list[torch.Tensor] = []
        self._inbox_bytes = 0
        self._number = 0

    def fill(self, room: torch.Tensor, dim: int, before: int, behind: int, ranks: int) -> None:
        """See `fill_halo`; on a GPU. The host does not wait."""
        # Imported where it is used: builds of torch without CUDA come without Triton.
        from services.parallel import edges_cuda

        edges = Edges.of(room, dim, before, behind)
        needed = (edges.count_before + edges.count_behind) * edges.word.itemsize
        if needed > self._inbox_bytes:
            self._make_inboxes(needed, edges_cuda.FLAG_BYTES, ranks)
        # As four bytes with a sign have it.
        self._number = (self._number + 1 + 2**31) % 2**32 - 2**31
        inbox = edges_cuda.FLAG_BYTES + self._number % 2 * self._inbox_bytes
        rank = self._peers.rank
        own, above, below = (
            self._memory[other] if 0 <= other < ranks else None for other in (rank, rank - 1, rank + 1)
        )
        edges_cuda.exchange(room, (own, above, below), self._number, inbox, edges)

    def _make_inboxes(self, needed: int, flag_bytes: int, ranks: int) -> None:
        """Of at least so many bytes, with all flags down; a collective."""
        size = rounded(flag_bytes + 2 * needed)
        self._memory, self._inbox_bytes = [], 0
        window = self._peers.window("edges", size)
        memory = [window.of(rank, (size,), torch.uint8) for rank in range(ranks)]
        memory[self._peers.rank][:flag_bytes].zero_()
        window.meet()
        self._memory, self._inbox_bytes, self._number = memory, (size - flag_bytes) // 16 * 8, 0
