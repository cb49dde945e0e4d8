"""HiDream's feed-forward: every token goes through a shared expert and through the few that a gate chooses for it.

The library sorts with a copy to the host in the middle, which no compiler follows. Here tokens are put into the order
of their experts once and back once, with the same sums. Shapes: B rows, S tokens, D width, N = B S, k of E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_hidream_image import (
    HiDreamImageTransformer2DModel,
    MOEFeedForwardSwiGLU,
)
from torch import nn

from services.experts import Experts


class MixtureOfExperts(nn.Module):
    """Stands in the place of the library's MOEFeedForwardSwiGLU, with its parts and their names."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.gate = library.gate
        self.experts = Experts(library.experts)
        self.shared_experts = library.shared_experts
        # Where linears lie on several ranks, their parts of routed and shared results are summed here, once.
        self.total = nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, D] to [B, S, D]."""
        # [N, k] each: a token's experts, and its weights of them.
        chosen, weights, _ = self.gate(hidden)
        experts = chosen.flatten()
        order = experts.argsort()
        numbers = torch.arange(self.gate.n_routed_experts, device=hidden.device)
        counts = (experts[:, None] == numbers).sum(dim=0)
        tokens = hidden.flatten(0, 1)[order // chosen.shape[1]]
        weighed = self.experts(tokens, counts) * weights.flatten()[order, None]
        routed = weighed[order.argsort()].unflatten(0, chosen.shape).sum(dim=1)
        total: torch.Tensor = self.total(routed.view_as(hidden) + self.shared_experts(hidden))
        return total


class HiDreamTransformer(HiDreamImageTransformer2DModel):  # type: ignore[misc]  # the library has no types
    """The library's transformer with this file's feed-forward, from the start: ranks cut it like all else."""

    @classmethod
    def from_config(cls, *arguments: Any, **options: Any) -> Any:
        """As the library's; `from_pretrained` calls it too."""
        model: Any = super().from_config(*arguments, **options)
        # Where norms lie on several ranks, each takes its piece of Llama's tokens here.
        model.own_llama = nn.Identity()
        for wrapper in (*model.double_stream_blocks, *model.single_stream_blocks):
            if isinstance(wrapper.block.ff_i, MOEFeedForwardSwiGLU):
                wrapper.block.ff_i = MixtureOfExperts(wrapper.block.ff_i)
        return model
