"""The experts of a mixture-of-experts block, and where ranks come in.

A family's block chooses experts for its tokens and calls its `Experts`. Where experts lie on several ranks, a module
that is called alike stands in their place (`services/parallel/experts.py`).
"""

from __future__ import annotations

import torch
from torch import nn

from services.parallel.degrees import split_sizes


class Experts(nn.ModuleList):
    """Experts, each a module from [n, D] to [n, D]."""

    def forward(self, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """What the experts make of tokens [N, D], which stand in the order of their experts.

        Args:
            counts: [E] tokens of each expert. The host waits for them: no expert computes more than its own.
        """
        pieces = tokens.split(token_counts(tokens, counts))
        return torch.cat([expert(piece) for expert, piece in zip(self, pieces, strict=True)])


def token_counts(tokens: torch.Tensor, counts: torch.Tensor) -> list[int]:
    """Counts [E] as numbers. On the meta device, where nobody knows them, as if tokens [N, D] were spread evenly."""
    if counts.device.type == "meta":
        return split_sizes(len(tokens), len(counts))
    numbers: list[int] = counts.tolist()
    return numbers
