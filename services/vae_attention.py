"""Attention in the middle of a VAE: one head as wide as all channels.

The fused kernels that reach rates of matrix products end at a width of 256; what is left for 384 and 512 takes three
times as long as the products do (16,384 pixels, width 512, H100: 4.5 ms). So on GPUs it is two products with a softmax
between them, for as many pixels at a time as keep the scores, in float32, within bounds.

Letters of shapes: B pictures, N pixels, C channels.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from services.vae_kernels import kernels_for

WIDEST_FUSED = 256
MAX_SCORES = 2**26
"""That are held at a time: 256 MiB."""


def attend_by_products(vae: nn.Module) -> int:
    """Rebinds a VAE's attentions, before anything is put around them.

    Returns:
        How many there are.
    """
    count = 0
    for module in vae.modules():
        layer: Any = module
        if hasattr(layer, "to_qkv") and hasattr(layer, "proj"):
            layer.forward = MethodType(_attend_in_clip, layer)
        elif isinstance(module, Attention) and module.heads == 1 and module.residual_connection:
            layer.forward = MethodType(_attend_in_picture, layer)
        else:
            continue
        # Ranks that have pieces of the picture gather them.
        layer.keys_of_all = None
        count += 1
    return count


def one_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of one head, [B, N, C] each."""
    width = query.shape[-1]
    if not query.is_cuda or query.dtype == torch.float32 or width <= WIDEST_FUSED:
        return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None]).squeeze(1)
    out = torch.empty_like(query)
    softmax, rows = kernels_for(query).softmax, max(1, MAX_SCORES // key.shape[1])
    for mixed, queries, keys, values in zip(out, query, key, value, strict=True):
        for some_mixed, some in zip(mixed.split(rows), queries.split(rows), strict=True):
            scores = torch.mm(some, keys.t(), out_dtype=torch.float32)
            torch.mm(softmax(scores, width**-0.5, query.dtype), values, out=some_mixed)
    return out


def _attend_in_clip(block: Any, x: torch.Tensor) -> torch.Tensor:
    """Of each frame of [B, C, F, H, W]."""
    frames = block.norm(x.transpose(1, 2).flatten(0, 1))
    query, key, value = block.to_qkv(frames).flatten(2).transpose(1, 2).chunk(3, dim=-1)
    key, value = _of_all(block, key, value)
    mixed = one_head(query, key, value).transpose(1, 2).unflatten(2, x.shape[3:])
    out: torch.Tensor = x + block.proj(mixed).unflatten(0, (len(x), -1)).transpose(1, 2)
    return out


def _attend_in_picture(attention: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Of [B, C, H, W]."""
    pixels = attention.group_norm(x).flatten(2).transpose(1, 2)
    query, key, value = (linear(pixels) for linear in (attention.to_q, attention.to_k, attention.to_v))
    key, value = _of_all(attention, key, value)
    mixed = attention.to_out[0](one_head(query, key, value)).transpose(1, 2).unflatten(2, x.shape[2:])
    out: torch.Tensor = (mixed + x) / attention.rescale_output_factor
    return out


def _of_all(attention: Any, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values of the whole picture."""
    if attention.keys_of_all is None:
        return key, value
    return attention.keys_of_all(torch.cat([key, value], dim=-1)).chunk(2, dim=-1)  # type: ignore[no-any-return]
