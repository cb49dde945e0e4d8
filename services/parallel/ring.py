"""Ring attention (arXiv 2310.01889): keys and values travel round the ranks, partial results merge by log-sum-exp.

While a piece is attended to, the next one is on its way: from its owner where the GPUs see each other's memory, passed
on round the ring elsewhere. That is one operator, so a compiled graph carries it without a break; what merges
its results is left to the compiler, which makes one kernel of it. Keys that are filling are left out and never masked:
kernels with a mask are far slower on GPUs, and the fastest have none. Shapes: B rows, L tokens of a piece, n ranks,
H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from functools import reduce

import torch
import torch.distributed as dist

from services.parallel.collectives import count_sent, group_of, hold, peer_memory, plan_sent, plan_window
from services.parallel.peer_memory import PeerMemory

# Of some keys, a result [B, L, H, D] and log-sum-exps [B, L, H] in fp32.
Partial = tuple[torch.Tensor, torch.Tensor]
# Keys and values, [B, L, H, D] each.
Piece = tuple[torch.Tensor, torch.Tensor]
# Those that hold a piece, by their use: two take turns in rings of more than two ranks.
WINDOWS = ("ring", "ring next")


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    orders: torch.Tensor,
    runs: torch.Tensor,
    group: str,
    kernel: str,
) -> torch.Tensor:
    """[B, L, H, D] of this rank's queries over the keys of all ranks.

    Args:
        orders: [n, B, L], places of each rank's piece, those of keys that count first.
        runs: [n, B, 2] on the CPU, from which place on those stand in a row, or -1, and how many there are. Values, so
            that a compiled graph serves all.
        kernel: name of a kernel of `services/attention.py`; where it has no partial form PyTorch's own is taken.
    """
    *results, shares = ring_parts(query, key, value, orders, runs, group, kernel)
    return merged(results, shares)


def merged(results: Sequence[torch.Tensor], shares: torch.Tensor) -> torch.Tensor:
    """The whole result [B, L, H, D] of n partial ones and their shares in it, [n, B, L, H]."""
    weighed = (result.float() * share[..., None] for result, share in zip(results, shares.unbind(), strict=True))
    return reduce(torch.add, weighed).to(results[0].dtype)


@torch.library.custom_op("lightloom::ring_parts", mutates_args=())
def ring_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    orders: torch.Tensor,
    runs: torch.Tensor,
    group: str,
    kernel: str,
) -> list[torch.Tensor]:
    """What `merged` takes, for the arguments of `ring_attention`: n partial results, then their shares.

    Those are the softmax of their log-sum-exps over the pieces: every query sees some key.
    """
    size, runs_of, peers = orders.shape[0], runs.tolist(), peer_memory.get(group)
    hold(orders, group)
    count_sent("ring", key, 2 * (size - 1))
    own = (key, value)
    with closing(_passed_on(own, group_of(group)) if peers is None else _exchanged(own, peers, size)) as pieces:
        parts = [_over_piece(query, piece, orders[owner], runs_of[owner], kernel) for owner, piece in pieces]
    results, lses = zip(*parts, strict=True)
    return [*results, torch.stack(lses).softmax(0)]


@ring_parts.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    orders: torch.Tensor,
    runs: torch.Tensor,
    group: str,
    kernel: str,
) -> list[torch.Tensor]:
    size = orders.shape[0]
    plan_sent("ring", key, 2 * (size - 1))
    if key.device.type == "meta":
        for use in WINDOWS[: size - 1]:
            plan_window(group, use, 2 * key.nbytes)
    results = [torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(size)]
    return [*results, query.new_empty((size, *query.shape[:3]), dtype=torch.float32)]


def _over_piece(
    query: torch.Tensor, piece: Piece, order: torch.Tensor, runs: Sequence[Sequence[int]], kernel: str
) -> Partial:
    """Attention over those of a piece that count; rows with different ones go one by one."""
    # Filling is in front of rows: with as many that count, they are the same.
    if all(run == runs[0] for run in runs):
        return partial_attention(query, _real(piece, order[0], *runs[0]), kernel)
    key, value = piece
    rows = [
        partial_attention(query[row, None], _real((key[row, None], value[row, None]), order[row], *run), kernel)
        for row, run in enumerate(runs)
    ]
    results, lses = zip(*rows, strict=True)
    return torch.cat(results), torch.cat(lses)


def _real(piece: Piece, order: torch.Tensor, first: int, count: int) -> Piece:
    """The tokens that count: mostly they stand in a row, and no kernel has to collect them."""
    key, value = piece
    if first >= 0:
        return key[:, first : first + count], value[:, first : first + count]
    return key.index_select(1, order[:count]), value.index_select(1, order[:count])


def partial_attention(query: torch.Tensor, piece: Piece, kernel: str) -> Partial:
    """Attention over some of the keys; over none of them results are zeros, and log-sum-exps minus infinity."""
    rows, tokens, heads, _ = query.shape
    key, value = piece
    if not key.shape[1]:
        result = torch.zeros_like(query, memory_format=torch.contiguous_format)
        return result, query.new_full((rows, tokens, heads), -torch.inf, dtype=torch.float32)
    result, lse = _kernel_with_lse(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), kernel)
    # Kernels give one more dimension, or more queries than there are.
    lse = lse.reshape(rows, heads, -1)[:, :, :tokens].float()
    return result.transpose(1, 2).contiguous(), lse.transpose(1, 2)


def _kernel_with_lse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: str) -> Partial:
    """With heads before tokens."""
    aten = torch.ops.aten
    if query.device.type == "cpu":
        mixed, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    elif query.dtype == torch.float32:
        mixed, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, None, True)
    elif kernel == "cudnn":
        mixed, lse, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
    else:
        mixed, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value)
    return mixed, lse


def _passed_on(own: Piece, ranks: dist.ProcessGroup) -> Generator[tuple[int, Piece]]:
    """Owners and pieces, one's own first, each passed on while the caller works on it."""
    rank, size = ranks.rank(), ranks.size()
    piece = torch.stack(own)
    for turn in range(size):
        incoming, works = _pass_on(piece, ranks) if turn < size - 1 else (piece, [])
        yield (rank - turn) % size, (piece[0], piece[1])
        for work in works:
            work.wait()
        piece = incoming


def _exchanged(own: Piece, peers: PeerMemory, size: int) -> Generator[tuple[int, Piece]]:
    """The same through windows; a piece is written into its next reader's while the caller works on another.

    Ranks meet before one is written: all have read then what lay there, whatever came before, and a CUDA graph may
    follow anything. Behind it they meet aside, so that nobody waits until another has attended to its piece.
    """
    shape, dtype = (2, *own[0].shape), own[0].dtype
    windows = [peers.window(use, 2 * own[0].nbytes) for use in WINDOWS[: size - 1]]
    piece = own
    for turn in range(1, size):
        window = windows[turn % len(windows)]
        window.meet()
        with peers.aside():
            for place, tensor in zip(window.of((peers.rank + turn) % size, shape, dtype), own, strict=True):
                place.copy_(tensor)
            window.meet()
            written = peers.mark()
        try:
            yield (peers.rank - turn + 1) % size, piece
        finally:
            # Before anybody's memory is used again, even where attention failed.
            peers.wait(written)
        key, value = window.of(peers.rank, shape, dtype)
        piece = (key, value)
    yield (peers.rank + 1) % size, piece


def _pass_on(piece: torch.Tensor, ranks: dist.ProcessGroup) -> tuple[torch.Tensor, list[dist.Work]]:
    """Starts sending a piece to the next rank and receiving the previous one's."""
    incoming = torch.empty_like(piece)
    size, rank = ranks.size(), ranks.rank()
    following, previous = (dist.get_global_rank(ranks, (rank + shift) % size) for shift in (1, -1))
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, piece, following, group=ranks),
            dist.P2POp(dist.irecv, incoming, previous, group=ranks),
        ]
    )
    return incoming, works
