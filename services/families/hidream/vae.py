"""HiDream's VAE part: an AutoencoderKL of 16 channels, whose latents are shifted and scaled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from services.conditions import described
from services.errors import InvalidRequest
from services.family import Inputs, Tensors, VaeModel, VaePart, VaePlan
from services.picture_codec import PictureCodec
from services.request import ResolvedParams
from services.weights import ModelSource


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> VaeModel:
    """The autoencoder."""
    vae = source.load(AutoencoderKL, "vae", device, dtype)
    return VaeModel(vae, PictureCodec(vae))


def decode(vae: VaeModel, rows: Sequence[Tensors], params: ResolvedParams) -> Iterator[torch.Tensor]:
    """Normalised latents [1, C, h, w] each to [B, 1, 3, H, W] in [-1, 1].

    Raises:
        InvalidRequest: latents of another shape than the parameters ask for.
    """
    channels, compression, _ = latent_geometry(vae)
    shape = (1, channels, params.height // compression, params.width // compression)
    for row in rows:
        if "latents" not in row or tuple(row["latents"].shape) != shape or not row["latents"].is_floating_point():
            raise InvalidRequest(f"the VAE needs floating-point 'latents' of shape {list(shape)}, not {described(row)}")
    latents = torch.cat([row["latents"] for row in rows]).to(vae.module.device, vae.module.dtype)
    latents = latents / vae.module.config.scaling_factor + vae.module.config.shift_factor
    return (pictures[:, None] for pictures in vae.codec.decode(latents))


def encode(_vae: VaeModel, _inputs: Inputs, _params: ResolvedParams) -> Tensors:
    """No variant takes pictures.

    Raises:
        InvalidRequest: always.
    """
    raise InvalidRequest("this model takes no input pictures", param="inputs")


def picture_latents(vae: VaeModel, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] to [B, C, h, w]: the posterior's mode, normalised."""
    latents = vae.mode(pixels)
    normalised: torch.Tensor = (latents - vae.module.config.shift_factor) * vae.module.config.scaling_factor
    return normalised


def latent_geometry(vae: VaeModel) -> tuple[int, int, int]:
    """Channels, spatial and temporal compression."""
    return vae.module.config.latent_channels, 2 ** (len(vae.module.config.block_out_channels) - 1), 1


VAE = VaePart(
    load=load,
    plan=VaePlan(attention=(Attention,)),
    decode=decode,
    encode=encode,
    latent_geometry=latent_geometry,
    picture_latents=picture_latents,
)
