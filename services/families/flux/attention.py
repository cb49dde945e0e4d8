"""Joint attention of FLUX's blocks: text and image tokens see each other, in two streams or laid side by side in one.

Shapes: B rows, S image tokens, T text tokens, H heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch

from services.attention import Attend

JOINT = "joint"

# Factors of the text [T, D / 2, 2] and of the image [S, D / 2, 2]: cosine, sine.
Rotary = tuple[torch.Tensor, torch.Tensor]


class JointAttention:
    """Processor of all blocks of a transformer. It takes every count of heads that a rank may hold."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Image [B, S, H D] and text [B, T, H D] after attention and their output projections.

        A block of one stream gets [B, T + S, H D], text first, and projects it itself.

        Args:
            encoder_hidden_states: the text, in blocks of two streams.
            attention_mask: the library's class passes it; the blocks never set it.
        """
        assert image_rotary_emb is not None
        words, places = image_rotary_emb
        width = attn.head_dim
        own = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        if encoder_hidden_states is None:
            query, key, value = _heads(hidden_states, width, torch.cat((words, places)), *own)
            (mixed,) = self._attend((query,), (key,), (value,))
            return mixed.flatten(2)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
        text = _heads(encoder_hidden_states, width, words, *added)
        image = _heads(hidden_states, width, places, *own)
        queries, keys, values = zip(text, image, strict=True)
        mixed_text, mixed = self._attend(queries, keys, values)
        return attn.to_out[0](mixed.flatten(2)), attn.to_add_out(mixed_text.flatten(2))


def rotary_factors(cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """The library's cosines and sines [S, D], each value twice in a row, as [S, D / 2, 2]."""
    return torch.stack((cosine[:, 0::2], sine[:, 0::2]), dim=-1)


def _heads(
    tokens: torch.Tensor, width: int, factors: torch.Tensor, *layers: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [B, S, H, D]; queries and keys normalised and rotated."""
    to_query, to_key, to_value, norm_query, norm_key = layers
    query, key, value = (project(tokens).unflatten(-1, (-1, width)) for project in (to_query, to_key, to_value))
    return _rotate(norm_query(query), factors), _rotate(norm_key(key), factors), value


def _rotate(heads: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    cosine, sine = factors[:, None].unbind(-1)
    real, imaginary = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((real * cosine - imaginary * sine, imaginary * cosine + real * sine), dim=-1)
    return rotated.flatten(-2).type_as(heads)
