"""Joint attention of Qwen-Image's blocks: text and image tokens see each other.

The library's processor rotates with complex numbers, which compilers leave alone; here the same products are taken of
real parts, bit for bit. Shapes: B rows, S image tokens, T text tokens, H heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch

from services.attention import Attend

JOINT = "joint"


class JointAttention:
    """Processor of all blocks of a transformer. It takes every count of heads that a rank may hold."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image [B, S, H D] and text [B, T, H D] after attention and their output projections.

        Args:
            encoder_hidden_states_mask: [B] tokens of filling in front of each row's text, on the CPU; None where every
                token counts. The library's mask would be [B, T].
            attention_mask: the library's base class passes it; the blocks never set it.
            image_rotary_emb: factors of image [1, S, D / 2, 2] and text [1 or B, T, D / 2, 2]: cosine, sine.
        """
        assert image_rotary_emb is not None
        width = attn.inner_dim // attn.heads
        image, text = image_rotary_emb
        query = _heads(attn.to_q(hidden_states), width, attn.norm_q, image)
        key = _heads(attn.to_k(hidden_states), width, attn.norm_k, image)
        value = _heads(attn.to_v(hidden_states), width)
        text_query = _heads(attn.add_q_proj(encoder_hidden_states), width, attn.norm_added_q, text)
        text_key = _heads(attn.add_k_proj(encoder_hidden_states), width, attn.norm_added_k, text)
        text_value = _heads(attn.add_v_proj(encoder_hidden_states), width)
        mixed_text, mixed = self._attend(
            (text_query, query), (text_key, key), (text_value, value), encoder_hidden_states_mask
        )
        return attn.to_out[0](mixed.flatten(2)), attn.to_add_out(mixed_text.flatten(2))


def rotary_factors(factors: torch.Tensor) -> torch.Tensor:
    """Unit complex numbers [S, D / 2] as [1, S, D / 2, 2]."""
    return torch.view_as_real(factors)[None]


def _heads(projected: torch.Tensor, width: int, norm: Any = None, factors: torch.Tensor | None = None) -> torch.Tensor:
    """[B, S, H D] to [B, S, H, D], normalised and rotated where asked."""
    heads = projected.unflatten(-1, (-1, width))
    if norm is not None:
        heads = norm(heads)
    return heads if factors is None else _rotate(heads, factors)


def _rotate(heads: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    cosine, sine = factors[:, :, None].unbind(-1)
    real, imaginary = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), dim=-1)
    return rotated.flatten(-2).type_as(heads)
