"""Clips in chunks and pictures as pictures, against the library's own way through the same weights."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from services import causal_stream
from services.causal_stream import CausalCodec, Stream, patchify, unpatchify

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
def stock(request: pytest.FixtureRequest) -> Any:
    """The library's own."""
    torch.manual_seed(0)
    return request.param().eval().requires_grad_(False)


@pytest.fixture
def codec(stock: Any) -> CausalCodec:
    return CausalCodec(copy.deepcopy(stock))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def decoded(codec: CausalCodec, latents: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(codec.decode(latents)), dim=2).clamp(-1, 1)


def moments(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    return vae.encode(pixels).latent_dist.parameters


def latents_of(vae: Any, frames: int) -> torch.Tensor:
    return torch.randn(1, vae.config.z_dim, frames, 8, 12)


def made_streams(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """Those that are made from now on."""
    streams: list[Stream] = []

    def make(**options: bool) -> Stream:
        streams.append(Stream(**options))
        return streams[-1]

    monkeypatch.setattr(causal_stream, "Stream", make)
    return streams


def test_a_picture_is_nearly_the_same(stock, codec):
    latents, pixels = latents_of(stock, 1), torch.rand(2, 3, 1, 64, 96) * 2 - 1
    assert apart(decoded(codec, latents), stock.decode(latents).sample) <= 1e-5
    assert apart(codec.encode(pixels), moments(stock, pixels)) <= 1e-5


def test_a_clip_is_nearly_the_same_and_its_latents_are_bit_for_bit_also_after_a_picture(stock, codec):
    list(codec.decode(latents_of(stock, 1)))
    latents, pixels = latents_of(stock, 4), torch.rand(1, 3, 9, 64, 96) * 2 - 1
    assert apart(decoded(codec, latents), stock.decode(latents).sample) <= 1e-5
    assert torch.equal(codec.encode(pixels), moments(stock, pixels))


def test_clips_that_take_turns_do_not_see_each_other(stock, codec):
    clips = [latents_of(stock, 3), latents_of(stock, 3)]
    chunks = list(zip(*map(codec.decode, clips), strict=True))
    for latents, ours in zip(clips, zip(*chunks, strict=True), strict=True):
        assert [chunk.shape[2] for chunk in ours] == [1, 4, 4]
        assert apart(torch.cat(ours, dim=2).clamp(-1, 1), stock.decode(latents).sample) <= 1e-5


def test_several_latent_frames_a_step_are_nearly_the_same(stock):
    latents = latents_of(stock, 6)
    theirs = stock.decode(latents).sample
    for step in (2, 3, 9):
        assert apart(decoded(CausalCodec(copy.deepcopy(stock), step), latents), theirs) <= 1e-5


def test_memory_does_not_grow_with_the_clip(stock, codec, monkeypatch):
    """What is alive while a chunk waits to be taken: the same after the fifth chunk as after the third."""
    streams = made_streams(monkeypatch)
    alive, chunks = [], []
    for chunk in codec.decode(latents_of(stock, 6)):
        [stream] = [stream for stream in streams if not stream.one_frame]
        alive.append(sum(kept.nbytes for kept in stream.history.values()))
        chunks.append(weakref.ref(chunk))
        del chunk
        assert sum(ref() is not None for ref in chunks) <= 1
    assert alive[2] == alive[5] > 0


@pytest.mark.parametrize("end", ["decoded", "given up", "encoded"])
def test_nothing_is_kept_of_a_clip_that_has_ended(stock, codec, monkeypatch, end):
    streams = made_streams(monkeypatch)
    if end == "encoded":
        codec.encode(torch.rand(1, 3, 9, 64, 96))
    else:
        chunks = codec.decode(latents_of(stock, 3))
        next(chunks)
        if end == "decoded":
            list(chunks)
        del chunks
    histories = [weakref.ref(kept) for stream in streams for kept in stream.history.values()]
    assert histories
    streams.clear()
    assert [ref for ref in histories if ref() is not None] == []


def test_decoding_and_pictures_run_no_3d_convolution_and_pictures_keep_no_history(stock, codec, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "conv3d", None)
    list(codec.decode(latents_of(stock, 3)))
    list(codec.decode(latents_of(stock, 1)))
    assert not codec._work.stream.history
    codec.encode(torch.rand(1, 3, 1, 64, 96))


def test_patches_are_the_librarys():
    from diffusers.models.autoencoders import autoencoder_kl_wan as library

    pixels = torch.rand(2, 3, 3, 8, 12)
    assert torch.equal(patchify(pixels, 2), library.patchify(pixels, 2))
    assert torch.equal(unpatchify(patchify(pixels, 2), 2), pixels)
