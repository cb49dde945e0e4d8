"""What is done to a VAE's layers for GPUs, on the CPU: the same frames."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from services.vae_on_gpu import compile_decoder, fuse_norms, seal, speed_up
from tests.parallel.vaes import KINDS, latents_of, pixels_of, vae_model


@pytest.mark.parametrize("kind", ["kl", "wan", "wan_residual"])
@torch.inference_mode()
def test_frames_and_latents_are_nearly_the_same(kind: str) -> None:
    plain, fast = vae_model(kind), vae_model(kind)
    speed_up(fast.module)
    for size, frames in (((12, 8), 3), ((7, 9), 2), ((5, 5), 1)):
        latents, pixels = latents_of(kind, *size, frames=frames), pixels_of(kind, *size, frames=4 * frames - 3)
        for ours, theirs in zip(fast.codec.decode(latents), plain.codec.decode(latents), strict=True):
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        ours, theirs = fast.codec.encode(pixels), plain.codec.encode(pixels)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.inference_mode()
def test_a_compiled_decoder_decodes_other_sizes_eagerly() -> None:
    plain, fast = vae_model("wan"), vae_model("wan")
    speed_up(fast.module)
    compile_decoder(fast.module)
    try:
        for sealed, size, frames in ((False, (6, 4), 4), (True, (6, 4), 5), (True, (5, 7), 4), (True, (5, 7), 1)):
            if sealed:
                seal()
            latents = latents_of("wan", *size, frames=frames)
            graphs = unique_graphs()
            for ours, theirs in zip(fast.codec.decode(latents), plain.codec.decode(latents), strict=True):
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
            assert (unique_graphs() == graphs) is sealed
    finally:
        torch.compiler.set_stance("default")


def unique_graphs() -> int:
    """How many graphs there are in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_activation_is_left_behind_a_norm(kind: str) -> None:
    vae = vae_model(kind).module
    norms = sum("norm" in name.rpartition(".")[2] and "attentions" not in name for name, _ in vae.named_modules())
    assert fuse_norms(vae) == norms > 10
    assert not any(isinstance(module, nn.SiLU) for module in vae.modules())


def test_norms_that_ranks_share_keep_their_activation() -> None:
    vae = vae_model("kl").module
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = module.forward
    assert fuse_norms(vae) == 0
    assert any(isinstance(module, nn.SiLU) for module in vae.modules())
