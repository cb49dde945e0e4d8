"""The one call that attention modules make, and where kernels and ranks come in.

A family's attention processors call an `Attend`; which kernel computes it, and whether the sequence is spread over
ranks, is decided from outside by features. Rows of unequal length have filling in front, so that what counts of a row
is one piece of memory. Shapes: B rows, Q queries, K keys, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

# (queries [B, Q, H, D], keys and values [B, K, H, D], filling [B] or None for "all keys count") -> [B, Q, H, D].
# `filling` counts the tokens in front of each row's first real one. It lies on the CPU: nobody waits for the device.
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, filling: torch.Tensor | None) -> torch.Tensor:
    """PyTorch's own choice of kernel."""
    if filling is not None and query.device.type != "cpu":
        return by_row(query, key, value, filling, "sdpa")
    keys = None if filling is None else real_keys(filling, key.shape[1])[:, None, None, :]
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), keys)
    return mixed.transpose(1, 2)


def cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, filling: torch.Tensor | None) -> torch.Tensor:
    """cuDNN's kernel."""
    if filling is not None:
        return by_row(query, key, value, filling, "cudnn")
    # The operator itself: choosing it by a context costs the host more than the launch.
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mixed: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, False)[0]
    return mixed.transpose(1, 2)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "cudnn": cudnn}


def real_keys(filling: torch.Tensor, keys: int) -> torch.Tensor:
    """Which of `keys` tokens count in each row, [B, keys]."""
    return torch.arange(keys, device=filling.device) >= filling[:, None]


def by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, filling: torch.Tensor, kernel: str
) -> torch.Tensor:
    """Each row's tokens among its real ones, by a kernel that takes no mask.

    Kernels with a mask are far slower on GPUs, and the fastest has none.
    """
    mixed: torch.Tensor = attention_by_row(query, key, value, filling, kernel)
    return mixed


@torch.library.custom_op("lightloom::attention_by_row", mutates_args=())
def attention_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, filling: torch.Tensor, kernel: str
) -> torch.Tensor:
    """See `by_row`: one operator, since compiled code must not know how many rows there are."""
    mixed = torch.empty_like(query, memory_format=torch.contiguous_format)
    for row, first in enumerate(filling.tolist()):
        own, real = slice(row, row + 1), slice(first, None)
        mixed[own] = KERNELS[kernel](query[own], key[own, real], value[own, real], None)
    return mixed


@attention_by_row.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, filling: torch.Tensor, kernel: str) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


# Tensors [B, L, H, D] that make one sequence, in its order.
Streams = Sequence[torch.Tensor]


class Attend:
    """What all attention modules of one kind call: one object for all blocks, so that they share compiled code.

    Attributes:
        kernel: computes it.
        across: spreads it over ranks, with the kernel as its first argument; None on one rank.
    """

    def __init__(self) -> None:
        self.kernel: Kernel = sdpa
        self.across: Callable[..., tuple[torch.Tensor, ...]] | None = None

    def __call__(
        self, queries: Streams, keys: Streams, values: Streams, filling: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Mixed values [B, L, H, D] of each stream of queries; `filling` as a `Kernel` takes it."""
        if self.across is not None:
            return self.across(self.kernel, queries, keys, values, filling)
        return taken_apart(self.kernel(joined(queries), joined(keys), joined(values), filling), queries)


def joined(streams: Streams) -> torch.Tensor:
    """The sequence that streams make."""
    return streams[0] if len(streams) == 1 else torch.cat(tuple(streams), dim=1)


def taken_apart(sequence: torch.Tensor, streams: Streams) -> tuple[torch.Tensor, ...]:
    """A sequence in streams again, each of the length that it has in `streams`."""
    parts = sequence.split([stream.shape[1] for stream in streams], dim=1)
    return tuple(part.contiguous() for part in parts)
