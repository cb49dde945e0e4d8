"""The one call that attention modules make, and where kernels and ranks come in.

A family's attention processors call an `Attend`; which kernel computes it, and whether the sequence is spread over
ranks, is decided from outside by features. Shapes: B rows, Q queries, K keys, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# (queries [B, Q, H, D], keys and values [B, K, H, D], mask [B, K] of bool or None for "all keys") -> [B, Q, H, D].
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """PyTorch's own choice of kernel."""
    keys = None if mask is None else mask[:, None, None, :]
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), keys)
    return mixed.transpose(1, 2)


def cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """cuDNN's kernel; calls that it cannot take, those with a mask, go to PyTorch's own choice."""
    if mask is not None:
        return sdpa(query, key, value, mask)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(query, key, value, None)


class Attend:
    """What all attention modules of one kind call: one object for all blocks, so that they share compiled code.

    Attributes:
        kernel: computes it.
        across: spreads it over ranks, with the kernel as its first argument; None on one rank.
    """

    def __init__(self) -> None:
        self.kernel: Kernel = sdpa
        self.across: Callable[..., torch.Tensor] | None = None

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mixed values [B, Q, H, D]; `mask` [B, K] says which keys count."""
        if self.across is not None:
            return self.across(self.kernel, query, key, value, mask)
        return self.kernel(query, key, value, mask)
