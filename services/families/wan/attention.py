"""Attention of Wan's blocks: tokens of the clip see each other, then the text.

Shapes: B rows, S tokens of the clip, T text tokens, H heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch

from services.attention import Attend
from services.families.wan.text import MAX_TOKENS

SELF, CROSS = "self", "cross"


class WanProcessor:
    """Processor of all self-attention, or of all cross-attention modules. It takes every count of heads."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """[B, S, H D] after attention and its output projection.

        Args:
            encoder_hidden_states: [B, T, H D] for cross-attention; tokens of pictures come before those of the text.
            attention_mask: never set; the library's class passes it.
            rotary_emb: cosines and sines [1, S, 1, D], each value twice in a row.
        """
        width = attn.inner_dim // attn.heads
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        pictures = None
        if attn.add_k_proj is not None:
            pictures, source = source[:, :-MAX_TOKENS], source[:, -MAX_TOKENS:]
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(-1, (-1, width))
        key = attn.norm_k(attn.to_k(source)).unflatten(-1, (-1, width))
        value = attn.to_v(source).unflatten(-1, (-1, width))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        (mixed,) = self._attend((query,), (key,), (value,))
        if pictures is not None:
            key = attn.norm_added_k(attn.add_k_proj(pictures)).unflatten(-1, (-1, width))
            value = attn.add_v_proj(pictures).unflatten(-1, (-1, width))
            (seen,) = self._attend((query,), (key,), (value,))
            mixed = mixed + seen
        projected: torch.Tensor = attn.to_out[0](mixed.flatten(2).type_as(query))
        return projected


def _rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    real, imaginary = heads.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cosine[..., 0::2], sine[..., 1::2]
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).flatten(-2).type_as(heads)
