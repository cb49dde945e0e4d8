"""Ring attention (arXiv 2310.01889): keys and values travel round the ranks, partial results merge by log-sum-exp.

While a piece is attended to, the next one is on its way: read from its owner where the GPUs see each other's memory,
passed on round the ring elsewhere. It is one operator, so a compiled graph carries it without a
break. Keys that are filling are left out and never masked: kernels with a mask are far slower on GPUs, and the fastest
have none. Shapes: B rows, L tokens of a piece, n ranks, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from services.parallel.collectives import count_sent, group_of, peer_memory, plan_shown
from services.parallel.peer_memory import PeerMemory

Partial = tuple[torch.Tensor, torch.Tensor]


@torch.library.custom_op("lightloom::ring_attention", mutates_args=())
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
    piece, peers, size = torch.stack((key, value)), peer_memory.get(group), orders.shape[0]
    if peers:
        peers.hold(orders)
    count_sent("ring", piece, size - 1)
    counted = counts.tolist()
    merged: Partial | None = None
    pieces = _passed_on(piece, group_of(group)) if peers is None else _read(piece, peers, size)
    for owner, keys_values in pieces:
        merged = _merge(merged, _over_piece(query, keys_values, orders[owner], counted[owner], kernel))
    assert merged is not None
    return merged[0].to(query.dtype).transpose(1, 2).contiguous()


@ring_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    orders: torch.Tensor,
    counts: torch.Tensor,
    group: str,
    kernel: str,
) -> torch.Tensor:
    if query.device.type == "meta":  # a dry run
        piece = torch.stack((key, value))
        count_sent("ring", piece, orders.shape[0] - 1)
        plan_shown(group, piece)
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _over_piece(
    query: torch.Tensor, keys_values: torch.Tensor, order: torch.Tensor, counts: Sequence[int], kernel: str
) -> Partial:
    """Attention over those of a piece [2, B, L, H, D] that count; rows with different ones go one by one."""
    if len(set(counts)) == 1:
        return partial_attention(query, _first(keys_values, order[0], counts[0]), kernel)
    rows = [
        partial_attention(query[row, None], _first(keys_values[:, row, None], order[row], count), kernel)
        for row, count in enumerate(counts)
    ]
    mixed, lse = zip(*rows, strict=True)
    return torch.cat(mixed), torch.cat(lse)


def _first(keys_values: torch.Tensor, order: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` of [2, B, L, H, D] in that order."""
    return keys_values if count == keys_values.shape[2] else keys_values.index_select(2, order[:count])


def partial_attention(query: torch.Tensor, keys_values: torch.Tensor, kernel: str) -> Partial:
    """Attention over some of the keys, [2, B, K, H, D]: result [B, H, L, D] in fp32 and log-sum-exp [B, H, L].

    Over none of them the log-sum-exp is minus infinity, and the result zeros.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, *keys_values))
    if not key.shape[2]:
        return torch.zeros_like(query, dtype=torch.float32), query.new_full(query.shape[:3], -torch.inf).float()
    mixed, lse = _kernel_with_lse(query, key, value, kernel)
    # Kernels give one more dimension, or more queries than there are.
    return mixed.float(), lse.reshape(*mixed.shape[:2], -1)[:, :, : query.shape[2]].float()


def _kernel_with_lse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: str) -> Partial:
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


def _merge(left: Partial | None, right: Partial) -> Partial:
    """(o, l) and (o', l') to (o + (o' - o) w, m), with m = log(e^l + e^l') and w = e^(l' - m) = sigmoid(l' - l).

    Where neither has a key, both l are minus infinity, and the result is zeros like both o.
    """
    if left is None:
        return right
    share = torch.sigmoid(right[1] - left[1]).nan_to_num(0.0)[..., None]
    return torch.lerp(left[0], right[0], share), torch.logaddexp(left[1], right[1])


def _passed_on(piece: torch.Tensor, ranks: dist.ProcessGroup) -> Iterator[tuple[int, torch.Tensor]]:
    """Owners and pieces, one's own first, each passed on while the caller works on it."""
    rank, size = ranks.rank(), ranks.size()
    for turn in range(size):
        incoming, works = _pass_on(piece, ranks) if turn < size - 1 else (piece, [])
        yield (rank - turn) % size, piece
        for work in works:
            work.wait()
        piece = incoming


def _read(piece: torch.Tensor, peers: PeerMemory, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """The same out of the owners' memory; the next piece is copied aside while the caller works on this one."""
    shown = peers.show(piece, size)
    for turn in range(size - 1):
        incoming = torch.empty_like(piece)
        with peers.aside():
            incoming.copy_(shown[(peers.rank - turn - 1) % size])
            arrival = peers.mark()
        yield (peers.rank - turn) % size, piece
        peers.wait(arrival)
        piece = incoming
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
