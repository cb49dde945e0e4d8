"""HiDream's VAE part: an AutoencoderKL of 16 channels, whose latents are shifted and scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from services.errors import InvalidRequest
from services.family import Frames, Tensors, VaePart
from services.request import ResolvedParams
from services.weights import ModelSource


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Any:
    """The autoencoder."""
    return source.load(AutoencoderKL, "vae", device, dtype)


def decode(vae: Any, rows: Sequence[Tensors], params: ResolvedParams) -> torch.Tensor:
    """Normalised latents [1, C, h, w] each to [B, 1, 3, H, W] in [-1, 1].

    Raises:
        InvalidRequest: latents of another shape than the parameters ask for.
    """
    channels, compression, _ = latent_geometry(vae)
    shape = (1, channels, params.height // compression, params.width // compression)
    for row in rows:
        if "latents" not in row or tuple(row["latents"].shape) != shape or not row["latents"].is_floating_point():
            raise InvalidRequest(f"the VAE needs floating-point 'latents' of shape {list(shape)}, not {_describe(row)}")
    latents = torch.cat([row["latents"] for row in rows]).to(vae.device, vae.dtype)
    frames: torch.Tensor = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[
        0
    ]
    return frames[:, None]


def encode(_vae: Any, _pictures: Sequence[Frames], _params: ResolvedParams) -> Tensors:
    """No variant takes pictures.

    Raises:
        InvalidRequest: always.
    """
    raise InvalidRequest("this model takes no input pictures", param="inputs")


def picture_latents(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] to [B, C, h, w]: the posterior's mode, normalised."""
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    normalised: torch.Tensor = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return normalised


def latent_geometry(vae: Any) -> tuple[int, int, int]:
    """Channels, spatial and temporal compression."""
    return vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1), 1


def _describe(row: Tensors) -> str:
    return ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in row.items()) or "nothing"


VAE = VaePart(load=load, decode=decode, encode=encode, latent_geometry=latent_geometry, picture_latents=picture_latents)
