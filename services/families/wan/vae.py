"""Wan's VAE: Wan 2.1 (16 channels, 8 pixels a latent) and Wan 2.2 (48 channels, 16 pixels); 4 frames a latent frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanAttentionBlock

from services.causal_stream import CausalCodec
from services.errors import InvalidRequest
from services.family import Frames, Tensors, VaeModel, VaePart, VaePlan
from services.request import ResolvedParams
from services.weights import ModelSource


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> VaeModel:
    """The autoencoder; clips go through it chunk by chunk."""
    vae = source.load(AutoencoderKLWan, "vae", device, dtype)
    return VaeModel(vae, CausalCodec(vae))


def decode(vae: VaeModel, rows: Sequence[Tensors], params: ResolvedParams) -> Iterator[torch.Tensor]:
    """Normalised latents [1, C, F', H', W'] each to [B, F, 3, H, W] in [-1, 1], F = 4 (F' - 1) + 1.

    Raises:
        InvalidRequest: latents of another shape than the parameters ask for.
    """
    channels, compression, frames_each = latent_geometry(vae)
    shape = (
        1,
        channels,
        (params.num_frames - 1) // frames_each + 1,
        params.height // compression,
        params.width // compression,
    )
    for row in rows:
        if "latents" not in row or tuple(row["latents"].shape) != shape or not row["latents"].is_floating_point():
            raise InvalidRequest(f"the VAE needs floating-point 'latents' of shape {list(shape)}, not {_describe(row)}")
    latents = torch.cat([row["latents"] for row in rows]).to(vae.module.device, vae.module.dtype)
    mean, scale = _statistics(vae, latents)
    return (frames.transpose(1, 2) for frames in vae.codec.decode(latents / scale + mean))


def encode(vae: VaeModel, pictures: Sequence[Frames], params: ResolvedParams) -> Tensors:
    """The first picture as the normalised latents of a clip's first frame [1, C, 1, H', W'].

    Raises:
        InvalidRequest: the picture has not the clip's size.
    """
    picture = pictures[0][:1]
    if picture.shape[1:3] != (params.height, params.width):
        raise InvalidRequest(
            f"the input picture has {picture.shape[2]}x{picture.shape[1]} pixels: it must have the clip's size, "
            f"{params.width}x{params.height}",
            param="inputs",
        )
    pixels = torch.from_numpy(picture.copy()).to(vae.module.device).permute(0, 3, 1, 2)
    return {"image_latents": picture_latents(vae, pixels.to(torch.float32) / 127.5 - 1)[:, :, None]}


def picture_latents(vae: VaeModel, pixels: torch.Tensor) -> torch.Tensor:
    """Single pictures [B, 3, H, W] in [-1, 1] to [B, C, H', W']: the posterior's mode, normalised."""
    latents = vae.mode(pixels[:, :, None])
    mean, scale = _statistics(vae, latents)
    normalised: torch.Tensor = ((latents - mean) * scale)[:, :, 0]
    return normalised


def latent_geometry(vae: VaeModel) -> tuple[int, int, int]:
    """Channels, spatial and temporal compression."""
    return vae.module.config.z_dim, vae.module.config.scale_factor_spatial, vae.module.config.scale_factor_temporal


def _statistics(vae: VaeModel, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, vae.module.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.module.config.latents_mean).view(shape).to(latents.device, latents.dtype)
    scale = 1.0 / torch.tensor(vae.module.config.latents_std).view(shape).to(latents.device, latents.dtype)
    return mean, scale


def _describe(row: Tensors) -> str:
    return ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in row.items()) or "nothing"


VAE = VaePart(
    load=load,
    plan=VaePlan(attention=(WanAttentionBlock,)),
    decode=decode,
    encode=encode,
    latent_geometry=latent_geometry,
    picture_latents=picture_latents,
)
