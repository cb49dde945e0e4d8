"""Previews: what the latents hold, through a linear fit, at a pixel a latent. Used by the engine."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from services.request import Media


@dataclass(frozen=True, slots=True)
class PreviewFit:
    """Linear latent-to-RGB fit: rgb = latent @ weight + bias, in [0, 1]. weight [C, 3], bias [3]."""

    weight: torch.Tensor
    bias: torch.Tensor


def preview_picture(latents: torch.Tensor, fit: PreviewFit) -> Media:
    """The middle frame of latents [F, C, H, W] through the fit, as JPEG: one pixel a latent."""
    frame = latents[latents.shape[0] // 2].float().permute(1, 2, 0)
    rgb = (frame @ fit.weight.to(frame.device) + fit.bias.to(frame.device)).clamp(0, 1)
    pixels: np.ndarray = (rgb * 255).round().to(torch.uint8).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).resize((4 * pixels.shape[1], 4 * pixels.shape[0])).save(file, "JPEG", quality=80)
    return Media("image/jpeg", file.getvalue(), "preview")
