"""Tiny VAEs of every class that families may bring, with random weights that are the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage, QwenImageAttentionBlock
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanAttentionBlock

from services.causal_stream import CausalCodec
from services.family import Codec, VaeModel, VaePlan
from services.picture_codec import PictureCodec

PICTURES = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
CLIPS = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
MOMENTS = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
RESIDUAL = {
    "decoder_base_dim": 8,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}


@dataclass(frozen=True)
class Kind:
    """A class of VAEs: how one is made, what ranks may know of it, and its compression."""

    make: Callable[[], Any]
    codec: Callable[[Any], Codec]
    plan: VaePlan
    compression: int = 8
    clips: bool = False


KINDS = {
    "kl": Kind(lambda: AutoencoderKL(**PICTURES), PictureCodec, VaePlan(attention=(Attention,))),
    "flux2": Kind(lambda: AutoencoderKLFlux2(**PICTURES), PictureCodec, VaePlan(attention=(Attention,))),
    "qwen": Kind(
        lambda: AutoencoderKLQwenImage(**CLIPS, **MOMENTS),
        CausalCodec,
        VaePlan(attention=(QwenImageAttentionBlock,)),
        clips=True,
    ),
    "wan": Kind(
        lambda: AutoencoderKLWan(**CLIPS, **MOMENTS), CausalCodec, VaePlan(attention=(WanAttentionBlock,)), clips=True
    ),
    "wan_residual": Kind(
        lambda: AutoencoderKLWan(**CLIPS, **MOMENTS, **RESIDUAL),
        CausalCodec,
        VaePlan(attention=(WanAttentionBlock,)),
        compression=16,
        clips=True,
    ),
}


def library_vae(name: str) -> Any:
    """The library's own, untouched."""
    torch.manual_seed(0)
    vae = KINDS[name].make().eval().requires_grad_(False)
    # Norms that do something: those of a fresh one are all ones and zeros.
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn_like(parameter)
    return vae


def vae_model(name: str) -> VaeModel:
    """The same with its codec for whole pictures."""
    vae = library_vae(name)
    return VaeModel(vae, KINDS[name].codec(vae))


def latents_of(name: str, height: int, width: int, frames: int = 1, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    inner = (frames,) if KINDS[name].clips else ()
    return torch.randn(batch, 4, *inner, height, width, generator=generator)


def pixels_of(name: str, height: int, width: int, frames: int = 1) -> torch.Tensor:
    """Height and width in latents."""
    generator = torch.Generator().manual_seed(height * width + 1)
    inner = (frames,) if KINDS[name].clips else ()
    scale = KINDS[name].compression
    return torch.rand(1, 3, *inner, scale * height, scale * width, generator=generator) * 2 - 1
