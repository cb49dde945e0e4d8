"""Attention of HiDream's blocks: image and text tokens see each other, as two streams or as one.

Shapes: B rows, S tokens of the first stream, T text tokens of a second one, H heads, D width of a head.
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
        hidden_states_masks: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        image_rotary_emb: torch.Tensor,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """[B, S, H D] after attention and its output projection; with a second stream also its [B, T, H D].

        Args:
            hidden_states_masks: [B, S] factors of the first stream's keys, 0 for filling and 1 for all else.
            encoder_hidden_states: [B, T, H D] of blocks with two streams.
            image_rotary_emb: factors [S + T, D / 2, 2]: cosine, sine.
        """
        width = attn.inner_dim // attn.heads
        query = attn.q_rms_norm(attn.to_q(hidden_states)).unflatten(-1, (-1, width))
        key = attn.k_rms_norm(attn.to_k(hidden_states)).unflatten(-1, (-1, width))
        value = attn.to_v(hidden_states).unflatten(-1, (-1, width))
        # Filling is not left out of attention: it is seen with a score of 0, as the model was trained.
        key = key * hidden_states_masks[..., None, None]
        if encoder_hidden_states is not None:
            text_query = attn.q_rms_norm_t(attn.to_q_t(encoder_hidden_states)).unflatten(-1, (-1, width))
            text_key = attn.k_rms_norm_t(attn.to_k_t(encoder_hidden_states)).unflatten(-1, (-1, width))
            text_value = attn.to_v_t(encoder_hidden_states).unflatten(-1, (-1, width))
            query = torch.cat([query, text_query], dim=1)
            key = torch.cat([key, text_key], dim=1)
            value = torch.cat([value, text_value], dim=1)
        query, key = _rotate(query, image_rotary_emb), _rotate(key, image_rotary_emb)
        (mixed,) = self._attend((query,), (key,), (value,))
        mixed, tokens = mixed.flatten(2), hidden_states.shape[1]
        out: torch.Tensor = attn.to_out(mixed[:, :tokens])
        return out if encoder_hidden_states is None else (out, attn.to_out_t(mixed[:, tokens:]))


def rotary_factors(matrices: torch.Tensor) -> torch.Tensor:
    """The library's rotations [1, S, 1, R, 2, 2] as [S, R, 2]: the first column of each."""
    return matrices[0, :, 0, :, :, 0]


def _rotate(heads: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """[B, S, H, D] with its first 2 R features turned in pairs; R may be less than D / 2."""
    turned = 2 * factors.shape[1]
    cosine, sine = factors[:, None].unbind(-1)
    real, imaginary = heads[..., :turned].float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), dim=-1)
    rotated = pairs.flatten(-2).type_as(heads)
    return rotated if turned == heads.shape[-1] else torch.cat([rotated, heads[..., turned:]], dim=-1)
