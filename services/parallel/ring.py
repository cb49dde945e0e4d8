"""Ring attention (arXiv 2310.01889): keys and values travel round the ranks, partial results merge by log-sum-exp.

While a piece is attended to, the next one is on its way: read from its owner where the GPUs see each other's memory,
passed on round the ring elsewhere. It is one operator, so a compiled graph carries it without a
break. Shapes: B rows, L tokens of a piece, n ranks, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from services.parallel.collectives import count_sent, group_of, peer_memory, plan_shown
from services.parallel.peer_memory import PeerMemory

# Numbers, of any dtype, in the largest load.
ALIGNED = 16
Partial = tuple[torch.Tensor, torch.Tensor]


@torch.library.custom_op("lightloom::ring_attention", mutates_args=())
def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: torch.Tensor,
    every: torch.Tensor,
    group: str,
    kernel: str,
) -> torch.Tensor:
    """[B, L, H, D] of this rank's queries over the keys of all ranks.

    Args:
        masks: [n, B, L], which keys of each rank's piece count.
        every: one bool on the CPU, whether all do. A value, so that a compiled graph serves both.
        kernel: name of a kernel of `services/attention.py`; where it has no partial form PyTorch's own is taken.
    """
    piece, peers = torch.stack((key, value)), peer_memory.get(group)
    count_sent("ring", piece, masks.shape[0] - 1)
    all_count = bool(every)
    merged: Partial | None = None
    pieces = _passed_on(piece, group_of(group)) if peers is None else _read(piece, peers, masks.shape[0])
    for owner, keys_values in pieces:
        mask = None if all_count else masks[owner]
        merged = _merge(merged, partial_attention(query, keys_values[0], keys_values[1], mask, kernel))
    assert merged is not None
    return merged[0].to(query.dtype).transpose(1, 2).contiguous()


@ring_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: torch.Tensor,
    every: torch.Tensor,
    group: str,
    kernel: str,
) -> torch.Tensor:
    if query.device.type == "meta":  # a dry run
        piece = torch.stack((key, value))
        count_sent("ring", piece, masks.shape[0] - 1)
        plan_shown(group, piece)
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def partial_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, kernel: str
) -> Partial:
    """Attention over some of the keys: result [B, H, L, D] in fp32 and log-sum-exp [B, H, L].

    A row none of whose keys counts has a log-sum-exp of minus infinity and a result of zeros.
    """
    heads_first = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    bias = None
    if mask is not None:
        bias = _bias(mask, query.dtype).expand(-1, query.shape[2], query.shape[1], -1)
    mixed, lse = _kernel_with_lse(heads_first, bias, kernel)
    lse = lse.reshape(*mixed.shape[:2], -1)[:, :, : query.shape[1]].float()
    if mask is not None:
        # Kernels differ in what they give for a row without keys.
        empty = ~mask.any(dim=1)[:, None, None]
        lse = lse.masked_fill(empty, float("-inf"))
        mixed = mixed.masked_fill(empty[..., None], 0)
    return mixed.float(), lse


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores, [B, 1, 1, K]; rows begin at addresses that kernels on GPUs can load from."""
    rows, keys = mask.shape
    bias = torch.zeros(rows, 1, 1, -(-keys // ALIGNED) * ALIGNED, dtype=dtype, device=mask.device)[..., :keys]
    return bias.masked_fill_(~mask[:, None, None], float("-inf"))


def _kernel_with_lse(heads_first: list[torch.Tensor], bias: torch.Tensor | None, kernel: str) -> Partial:
    aten = torch.ops.aten
    query, key, value = heads_first
    if query.device.type == "cpu":
        mixed, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias)
    elif bias is not None or query.dtype == torch.float32:
        mixed, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)
    elif kernel == "cudnn":
        mixed, lse, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
    else:
        mixed, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value)
    return mixed, lse


def _merge(left: Partial | None, right: Partial) -> Partial:
    """(o, l) and (o', l') to (o e^(l - m) + o' e^(l' - m), m) with m = log(e^l + e^l')."""
    if left is None:
        return right
    lse = torch.logaddexp(left[1], right[1])
    weights = [torch.exp(part[1] - lse).nan_to_num(0.0)[..., None] for part in (left, right)]
    return left[0] * weights[0] + right[0] * weights[1], lse


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
