"""Ring attention (arXiv 2310.01889): keys and values travel round the ranks, partial results merge by log-sum-exp.

While a piece is attended to, the next one is on its way: read from its owner where the GPUs see each other's memory,
passed on round the ring elsewhere. That is one operator, so a compiled graph carries it without a break; what merges
its results is left to the compiler, which makes one kernel of it. Keys that are filling are left out and never masked:
kernels with a mask are far slower on GPUs, and the fastest have none. Shapes: B rows, L tokens of a piece, n ranks,
H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
import torch.distributed as dist

from services.parallel.collectives import count_sent, group_of, hold, peer_memory, plan_sent, plan_shown
from services.parallel.peer_memory import PeerMemory

# Of some keys, a result [B, L, H, D] and log-sum-exps [B, H, L] in fp32.
Partial = tuple[torch.Tensor, torch.Tensor]
# Keys and values, [B, L, H, D] each.
Piece = tuple[torch.Tensor, torch.Tensor]


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    orders: torch.Tensor,
    counts: torch.Tensor,
    group: str,
    kernel: str,
) -> torch.Tensor:
    """[B, L, H, D] of this rank's queries over the keys of all ranks.

    Args:
        orders: [n, B, L], places of each rank's piece, those of keys that count first.
        counts: [n, B] on the CPU, how many do. Values, so that a compiled graph serves all.
        kernel: name of a kernel of `services/attention.py`; where it has no partial form PyTorch's own is taken.
    """
    parts = ring_parts(query, key, value, orders, counts, group, kernel)
    ranks = len(parts) // 2
    return merged(parts[:ranks], parts[ranks:])


def merged(results: Sequence[torch.Tensor], sums: Sequence[torch.Tensor]) -> torch.Tensor:
    """Partial results o_i with log-sum-exps l_i to the whole one: the sum of o_i e^(l_i) over that of e^(l_i).

    Where no piece has a key, all l_i are minus infinity, and the result is zeros like all o_i.
    """
    largest = reduce(torch.maximum, sums).clamp(min=torch.finfo(torch.float32).min)
    weights = [torch.exp(each - largest) for each in sums]
    # The largest weighs 1.
    whole = reduce(torch.add, weights).clamp(min=1.0)
    shares = [(weight / whole).transpose(1, 2)[..., None] for weight in weights]
    mixed = [result.float() * share for result, share in zip(results, shares, strict=True)]
    return reduce(torch.add, mixed).to(results[0].dtype)


@torch.library.custom_op("lightloom::ring_parts", mutates_args=())
def ring_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    orders: torch.Tensor,
    counts: torch.Tensor,
    group: str,
    kernel: str,
) -> list[torch.Tensor]:
    """What `merged` takes, for the arguments of `ring_attention`: n results, then their n log-sum-exps."""
    size, counted, peers = orders.shape[0], counts.tolist(), peer_memory.get(group)
    hold(orders, group)
    count_sent("ring", key, 2 * (size - 1))
    own = (key, value)
    pieces = _passed_on(own, group_of(group)) if peers is None else _read(own, peers, size)
    parts = [_over_piece(query, piece, orders[owner], counted[owner], kernel) for owner, piece in pieces]
    return [result for result, _ in parts] + [sums for _, sums in parts]


@ring_parts.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    orders: torch.Tensor,
    counts: torch.Tensor,
    group: str,
    kernel: str,
) -> list[torch.Tensor]:
    size = orders.shape[0]
    plan_sent("ring", key, 2 * (size - 1))
    plan_shown(group, key, 2)
    rows, tokens, heads, _ = query.shape
    results = [torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(size)]
    return results + [query.new_empty((rows, heads, tokens), dtype=torch.float32) for _ in range(size)]


def _over_piece(query: torch.Tensor, piece: Piece, order: torch.Tensor, counts: Sequence[int], kernel: str) -> Partial:
    """Attention over those of a piece that count; rows with different ones go one by one."""
    if len(set(counts)) == 1:
        return partial_attention(query, _first(piece, order[0], counts[0]), kernel)
    key, value = piece
    rows = [
        partial_attention(query[row, None], _first((key[row, None], value[row, None]), order[row], count), kernel)
        for row, count in enumerate(counts)
    ]
    results, sums = zip(*rows, strict=True)
    return torch.cat(results), torch.cat(sums)


def _first(piece: Piece, order: torch.Tensor, count: int) -> Piece:
    """The first `count` tokens in that order."""
    key, value = piece
    if count == key.shape[1]:
        return piece
    return key.index_select(1, order[:count]), value.index_select(1, order[:count])


def partial_attention(query: torch.Tensor, piece: Piece, kernel: str) -> Partial:
    """Attention over some of the keys; over none of them results are zeros, and log-sum-exps minus infinity."""
    rows, tokens, heads, _ = query.shape
    key, value = piece
    if not key.shape[1]:
        result = torch.zeros_like(query, memory_format=torch.contiguous_format)
        return result, query.new_full((rows, heads, tokens), -torch.inf, dtype=torch.float32)
    result, sums = _kernel_with_lse(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), kernel)
    # Kernels give one more dimension, or more queries than there are.
    sums = sums.reshape(rows, heads, -1)[:, :, :tokens].float()
    return result.transpose(1, 2).contiguous(), sums.contiguous()


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


def _passed_on(own: Piece, ranks: dist.ProcessGroup) -> Iterator[tuple[int, Piece]]:
    """Owners and pieces, one's own first, each passed on while the caller works on it."""
    rank, size = ranks.rank(), ranks.size()
    piece = torch.stack(own)
    for turn in range(size):
        incoming, works = _pass_on(piece, ranks) if turn < size - 1 else (piece, [])
        yield (rank - turn) % size, (piece[0], piece[1])
        for work in works:
            work.wait()
        piece = incoming


def _read(own: Piece, peers: PeerMemory, size: int) -> Iterator[tuple[int, Piece]]:
    """The same out of the owners' memory; the next piece is copied aside while the caller works on this one."""
    shown, piece = peers.show_stacked(own, size), own
    for turn in range(size - 1):
        incoming = own[0].new_empty(shown[0].shape)
        with peers.aside():
            incoming.copy_(shown[(peers.rank - turn - 1) % size])
            arrival = peers.mark()
        yield (peers.rank - turn) % size, piece
        peers.wait(arrival)
        piece = (incoming[0], incoming[1])
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
