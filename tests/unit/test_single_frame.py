"""The 2-D path for single frames against the library's own 3-D path, on the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from services.single_frame import use_2d

SMALL = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
MOMENTS = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


def qwen() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(**SMALL, **MOMENTS)


def wan() -> AutoencoderKLWan:
    return AutoencoderKLWan(**SMALL, **MOMENTS)


def wan_residual() -> AutoencoderKLWan:
    """As Wan 2.2: patches of 2, residual blocks."""
    return AutoencoderKLWan(
        **SMALL,
        **MOMENTS,
        decoder_base_dim=8,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )


@pytest.fixture(params=[qwen, wan, wan_residual], ids=lambda make: make.__name__)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """(the library's own, with the 2-D path)."""
    torch.manual_seed(0)
    stock = request.param().eval().requires_grad_(False)
    fast = copy.deepcopy(stock)
    assert use_2d(fast) > 10
    return stock, fast


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def encoded(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    return vae.encode(pixels).latent_dist.mode()


def latents_of(vae: Any, frames: int) -> torch.Tensor:
    return torch.randn(2, 4, frames, 64 // vae.spatial_compression_ratio, 96 // vae.spatial_compression_ratio)


@torch.inference_mode()
def test_a_picture_is_the_same(pair: tuple[Any, Any]) -> None:
    stock, fast = pair
    latents, pixels = latents_of(stock, 1), torch.rand(2, 3, 1, 64, 96) * 2 - 1
    assert apart(fast.decode(latents).sample, stock.decode(latents).sample) <= 1e-5
    assert apart(encoded(fast, pixels), encoded(stock, pixels)) <= 1e-5


@torch.inference_mode()
def test_a_clip_is_the_same_bit_for_bit_also_after_a_picture(pair: tuple[Any, Any]) -> None:
    stock, fast = pair
    fast.decode(latents_of(fast, 1))
    latents, pixels = latents_of(stock, 3), torch.rand(1, 3, 9, 64, 96) * 2 - 1
    assert torch.equal(fast.decode(latents).sample, stock.decode(latents).sample)
    assert torch.equal(encoded(fast, pixels), encoded(stock, pixels))


@torch.inference_mode()
def test_tiles_are_the_same(pair: tuple[Any, Any]) -> None:
    stock, fast = pair
    for vae in pair:
        vae.enable_tiling(32, 32, 16, 16)
    latents = latents_of(stock, 1)
    assert apart(fast.decode(latents).sample, stock.decode(latents).sample) <= 1e-5


@torch.inference_mode()
def test_a_picture_runs_no_3d_convolution_and_keeps_no_cache(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fast = pair
    monkeypatch.setattr(torch.nn.Conv3d, "forward", None)
    kept = []
    clear = fast.clear_cache
    monkeypatch.setattr(fast, "clear_cache", lambda: (kept.append(getattr(fast, "_feat_map", None)), clear()))
    fast.decode(latents_of(fast, 1))
    encoded(fast, torch.rand(1, 3, 1, 64, 96))
    assert not any(kept)


def test_a_vae_without_causal_convolutions_is_left_alone() -> None:
    module = torch.nn.Sequential(torch.nn.Conv3d(3, 3, 3), torch.nn.Conv2d(3, 3, 3))
    assert use_2d(module) == 0
    assert "forward" not in vars(module[0])
