"""Wan's VAE: Wan 2.1 (16 channels, 8 pixels a latent) and Wan 2.2 (48 channels, 16 pixels); 4 frames a latent frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanAttentionBlock

from services.causal_stream import CausalCodec
from services.conditions import described
from services.errors import InvalidRequest
from services.families.wan.control import (
    clip_and_mask,
    mask_channels,
    pixels_of,
    reference_pixels,
    references_before,
)
from services.family import Inputs, Tensors, VaeModel, VaePart, VaePlan
from services.request import ResolvedParams
from services.weights import ModelSource


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> VaeModel:
    """The autoencoder; clips go through it chunk by chunk."""
    vae: Any = source.load(AutoencoderKLWan, "vae", device, dtype)
    per_token, steered = bool(source.settings().get("expand_timesteps")), source.variant.startswith("vace")
    vae.register_to_config(timestep_per_token=per_token, steered=steered)
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
            raise InvalidRequest(f"the VAE needs floating-point 'latents' of shape {list(shape)}, not {described(row)}")
    latents = torch.cat([row["latents"] for row in rows]).to(vae.module.device, vae.module.dtype)
    mean, scale = _statistics(vae, latents)
    return (frames.transpose(1, 2) for frames in vae.codec.decode(latents / scale + mean))


def encode(vae: VaeModel, inputs: Inputs, params: ResolvedParams) -> Tensors:
    """The clip as far as it is given: normalised latents in fp32.

    Returns:
        "first_frame" [1, C, 1, H', W'], where the model has a timestep for each token. Else "condition"
        [1, 4 + C, F', H', W']: for each frame of a latent frame whether it is given, then the latents of the clip
        with its first and, if it is given, its last picture, and grey between them. For VACE "control"
        [1, 2 C + P^2, R + F', H', W'], R reference pictures before the clip, P pixels for a latent along a side.

    Raises:
        InvalidRequest: the first picture is missing, or the clip is too short for two.
    """
    if vae.module.config.steered:
        return {"control": _control(vae, inputs, params)}
    if "image" not in inputs:
        raise InvalidRequest("the first picture of the clip is missing: an input of the role image", param="inputs")
    first = pixels_of(inputs["image"][0], params)
    if vae.module.config.timestep_per_token:
        return {"first_frame": _normalised(vae, vae.mode(first))}
    if "last_image" in inputs and params.num_frames == 1:
        raise InvalidRequest("num_frames is 1: a clip from a first to a last picture has more", param="num_frames")
    clip = torch.zeros(1, 3, params.num_frames, params.height, params.width)
    given = torch.zeros(params.num_frames)
    clip[:, :, :1], given[0] = first, 1
    if "last_image" in inputs:
        clip[:, :, -1:], given[-1] = pixels_of(inputs["last_image"][0], params), 1
    latents = _normalised(vae, vae.mode(clip))
    _, _, frames_each = latent_geometry(vae)
    # A first latent frame has one frame, which stands for all of its places.
    places = torch.cat([given[:1].expand(frames_each - 1), given]).view(-1, frames_each).T
    mask = places[None, :, :, None, None].expand(-1, -1, -1, *latents.shape[3:])
    return {"condition": torch.cat([mask.to(latents.device), latents], dim=1)}


def _control(vae: VaeModel, inputs: Inputs, params: ResolvedParams) -> torch.Tensor:
    """What stays of the clip, what is made anew, and the mask."""
    _, side, frames_each = latent_geometry(vae)
    clip, mask = clip_and_mask(inputs, params)
    anew = (mask > 0.5).to(clip.dtype)
    stays, goes = (_rounded(vae, pixels) for pixels in (clip * (1 - anew), clip * anew))
    pictures = [_rounded(vae, reference_pixels(picture, params, side)) for picture in inputs.get("image", ())]
    latents = references_before(torch.cat([stays, goes], dim=1), pictures)
    channels = mask_channels(mask, side, frames_each, len(pictures))
    return torch.cat([latents, channels.to(latents.device)], dim=1)


def _rounded(vae: VaeModel, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised latents, as the stock pipeline for VACE rounds them."""
    return _normalised(vae, vae.mode(pixels)).to(vae.module.dtype).to(torch.float32)


def _normalised(vae: VaeModel, latents: torch.Tensor) -> torch.Tensor:
    latents = latents.to(torch.float32)
    mean, scale = _statistics(vae, latents)
    normalised: torch.Tensor = (latents - mean) * scale
    return normalised


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


VAE = VaePart(
    load=load,
    plan=VaePlan(attention=(WanAttentionBlock,)),
    decode=decode,
    encode=encode,
    latent_geometry=latent_geometry,
    picture_latents=picture_latents,
)
