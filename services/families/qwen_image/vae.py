"""Qwen-Image's VAE part: packed latents to pictures, input pictures to latents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage, QwenImageAttentionBlock

from services.causal_stream import CausalCodec
from services.errors import InvalidRequest
from services.families.qwen_image.latents import PATCH, unpack
from services.families.qwen_image.pictures import edited_area, resized, scaled, to_tensor
from services.families.qwen_image.recipes import recipe_of
from services.family import Inputs, Tensors, VaeModel, VaePart, VaePlan
from services.request import ResolvedParams
from services.weights import ModelSource


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> VaeModel:
    """The autoencoder, whose pictures take the path for single frames."""
    vae: Any = source.load(AutoencoderKLQwenImage, "vae", device, dtype)
    recipe = recipe_of(source)
    vae.register_to_config(latent_area_px=recipe.latent_area_px, layers=recipe.layers)
    return VaeModel(vae, CausalCodec(vae))


def decode(vae: VaeModel, rows: Sequence[Tensors], params: ResolvedParams) -> Iterator[torch.Tensor]:
    """Packed normalised latents [1, S, 4 C] each to [B, 1, 3, H, W] in [-1, 1]; layers one by one, with 4 channels."""
    patch_px = compression(vae) * PATCH
    layers = params.num_frames if vae.module.config.layers else 0
    grid = (1 + layers, params.height // patch_px, params.width // patch_px)
    shape = (1, math.prod(grid), vae.module.config.z_dim * PATCH * PATCH)
    for row in rows:
        if "latents" not in row or tuple(row["latents"].shape) != shape:
            raise InvalidRequest(f"the VAE needs 'latents' of shape {list(shape)}, not {_shapes(row)}")
        if not row["latents"].is_floating_point():
            raise InvalidRequest(f"the VAE needs floating-point latents, not {row['latents'].dtype}")
    latents = unpack(torch.cat([row["latents"] for row in rows]).to(vae.module.device), grid).to(vae.module.dtype)
    mean, std = _statistics(vae, latents)
    spread = latents / (1.0 / std) + mean
    # The first is the whole picture; each layer is a picture of its own to the VAE.
    pictures = spread.split(1, dim=2)[1:] if layers else (spread,)
    return (frames.transpose(1, 2) for picture in pictures for frames in vae.codec.decode(picture))


def encode(vae: VaeModel, inputs: Inputs, params: ResolvedParams) -> Tensors:
    """Each picture, scaled to the model's area, as "image/N" [1, C, h, w]; one to take apart to the size of its layers.

    With a mask also the first picture in the size that is made, as "kept", and "mask" [1, 1, h, w], 1 where it is
    edited.

    Raises:
        InvalidRequest: the model takes no pictures, or not one of that shape, or the mask does not fit.
    """
    if "image" not in inputs or not (vae.module.config.latent_area_px or "mask" in inputs):
        raise InvalidRequest("this model takes no such input pictures", param="inputs")
    encoded: Tensors = {}
    size = (params.width, params.height)
    for index, picture in enumerate(inputs["image"] if vae.module.config.latent_area_px else ()):
        if vae.module.config.layers:
            pixels = to_tensor(resized(picture, size))
        else:
            pixels = to_tensor(scaled(picture, vae.module.config.latent_area_px))
        encoded[f"image/{index}"] = picture_latents(vae, pixels)
    if "mask" in inputs:
        [mask], first = inputs["mask"], inputs["image"][0]
        encoded["mask"] = edited_area(mask, first, size, compression(vae))
        encoded["kept"] = picture_latents(vae, to_tensor(resized(first, size)))
    return encoded


def picture_latents(vae: VaeModel, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3 or 4, H, W] in [-1, 1] to [B, C, H/8, W/8]: the posterior's mode, normalised."""
    if alpha(vae) and pixels.shape[1] == 3:
        pixels = F.pad(pixels, (0, 0, 0, 0, 0, 1), value=1.0)
    latents = vae.mode(pixels[:, :, None])
    mean, std = _statistics(vae, latents)
    return ((latents - mean) / std)[:, :, 0]


def alpha(vae: VaeModel) -> bool:
    """Whether pictures have a fourth channel."""
    return bool(vae.module.config.input_channels == 4)


def latent_geometry(vae: VaeModel) -> tuple[int, int, int]:
    """Channels, spatial and temporal compression."""
    return vae.module.config.z_dim, compression(vae), 2 ** sum(vae.module.config.temperal_downsample)


def compression(vae: VaeModel) -> int:
    """Pixels for one latent along a side."""
    return int(2 ** len(vae.module.config.temperal_downsample))


def _statistics(vae: VaeModel, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, vae.module.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.module.config.latents_mean).view(shape).to(latents.device, latents.dtype)
    std = torch.tensor(vae.module.config.latents_std).view(shape)
    return mean, std.to(latents.device, latents.dtype)


def _shapes(row: Tensors) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in row.items()) or "nothing"


VAE = VaePart(
    load=load,
    plan=VaePlan(attention=(QwenImageAttentionBlock,)),
    decode=decode,
    encode=encode,
    latent_geometry=latent_geometry,
    picture_latents=picture_latents,
    alpha=alpha,
)
