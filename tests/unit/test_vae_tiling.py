"""Tiles for every family's VAE: what `engine.tile_px` asks for is done, and the picture is nearly the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.families import FAMILIES, load_family
from services.parallel.vae_tiles import TileCodec
from services.weights import open_source

SIDE_PX, TILE_PX = 192, 96


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_picture_in_tiles_is_nearly_the_same(name: str, tmp_path: Path) -> None:
    family = load_family(name)
    family.tiny(tmp_path, next(iter(family.variants)), 0)
    vae = family.vae.load(open_source(str(tmp_path)), torch.device("cpu"), torch.float32)
    channels, covered_px, _ = family.vae.latent_geometry(vae)
    frames = () if type(vae.module).__name__ == "AutoencoderKL" else (1,)
    torch.manual_seed(0)
    latents = torch.randn(1, channels, *frames, SIDE_PX // covered_px, SIDE_PX // covered_px)
    [whole] = vae.codec.decode(latents)
    [tiled] = TileCodec(vae.codec, TILE_PX, covered_px).decode(latents)
    assert tiled.shape == whole.shape and whole.shape[-1] == SIDE_PX
    # Norms and attention of a tile see that tile only; what is equal to the last bit was not tiled.
    assert 0.8 < likeness(tiled, whole) < 1.0 and not torch.equal(tiled, whole)
    # A tile that is one latent off its place would be found out.
    assert likeness(tiled.roll(covered_px, -1), whole) < 0.5


def likeness(one: torch.Tensor, other: torch.Tensor) -> float:
    """Correlation of two pictures."""
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])
