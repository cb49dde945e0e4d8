"""Qwen-Image's VAE part: packed latents to pictures, input pictures to latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage

from services.errors import InvalidRequest
from services.families.qwen_image.latents import PATCH, unpack
from services.families.qwen_image.pictures import scaled, to_tensor
from services.families.qwen_image.recipes import recipe_of
from services.family import Frames, Tensors, VaePart
from services.request import ResolvedParams
from services.single_frame import use_2d
from services.weights import ModelSource


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Any:
    """The autoencoder, with the fast path for single frames."""
    vae: Any = source.load(AutoencoderKLQwenImage, "vae", device, dtype)
    vae.register_to_config(latent_area_px=recipe_of(source).latent_area_px)
    use_2d(vae)
    return vae


def decode(vae: Any, rows: Sequence[Tensors], params: ResolvedParams) -> torch.Tensor:
    """Packed normalised latents [1, S, 4 C] each to [B, 1, 3, H, W] in [-1, 1]."""
    patch_px = compression(vae) * PATCH
    grid = (1, params.height // patch_px, params.width // patch_px)
    shape = (1, grid[1] * grid[2], vae.config.z_dim * PATCH * PATCH)
    for row in rows:
        if "latents" not in row or tuple(row["latents"].shape) != shape:
            raise InvalidRequest(f"the VAE needs 'latents' of shape {list(shape)}, not {_shapes(row)}")
        if not row["latents"].is_floating_point():
            raise InvalidRequest(f"the VAE needs floating-point latents, not {row['latents'].dtype}")
    latents = unpack(torch.cat([row["latents"] for row in rows]).to(vae.device), grid).to(vae.dtype)
    mean, std = _statistics(vae, latents)
    frames: torch.Tensor = vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
    return frames.transpose(1, 2)


def encode(vae: Any, pictures: Sequence[Frames], _params: ResolvedParams) -> Tensors:
    """Each picture, scaled to the model's area, as "image/N" [1, C, h, w].

    Raises:
        InvalidRequest: the model takes no pictures, or not one of that shape.
    """
    if not vae.config.latent_area_px:
        raise InvalidRequest("this model takes no input pictures", param="inputs")
    encoded = {}
    for index, picture in enumerate(pictures):
        pixels = to_tensor(scaled(picture, vae.config.latent_area_px))
        encoded[f"image/{index}"] = picture_latents(vae, pixels)
    return encoded


def picture_latents(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] to [B, C, H/8, W/8]: the posterior's mode, normalised."""
    latents: torch.Tensor = vae.encode(pixels.to(vae.device, vae.dtype)[:, :, None]).latent_dist.mode()
    mean, std = _statistics(vae, latents)
    return ((latents - mean) / std)[:, :, 0]


def latent_geometry(vae: Any) -> tuple[int, int, int]:
    """Channels, spatial and temporal compression."""
    return vae.config.z_dim, compression(vae), 2 ** sum(vae.config.temperal_downsample)


def compression(vae: Any) -> int:
    """Pixels for one latent along a side."""
    return int(2 ** len(vae.config.temperal_downsample))


def _statistics(vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
    std = torch.tensor(vae.config.latents_std).view(shape)
    return mean, std.to(latents.device, latents.dtype)


def _shapes(row: Tensors) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in row.items()) or "nothing"


VAE = VaePart(
    load=load,
    decode=decode,
    encode=encode,
    latent_geometry=latent_geometry,
    picture_latents=picture_latents,
)
