"""The codec of VAEs for pictures (AutoencoderKL, AutoencoderKLFlux2): one picture is one chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class PictureCodec:
    """A diffusers VAE whose encoder and decoder take pictures."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def decode(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Latents [B, C, h, w] to one chunk [B, 3, H, W]."""
        if self._vae.post_quant_conv is not None:
            latents = self._vae.post_quant_conv(latents)
        yield self._vae.decoder(latents)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, H, W] to means and log variances [B, 2 C, h, w]."""
        moments: torch.Tensor = self._vae.encoder(pixels)
        return moments if self._vae.quant_conv is None else self._vae.quant_conv(moments)
