"""What is done to a VAE's layers for GPUs, on the CPU: the same frames."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from services.vae_on_gpu import compile_decoder, fuse_blocks, fuse_norms, group_norm, seal, speed_up
from tests.parallel.vaes import KINDS, latents_of, pixels_of, vae_model


@pytest.fixture
def traced(monkeypatch) -> None:
    """Graphs are traced, and run without a compiler, which takes a minute for each model on a CPU."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.usefixtures("traced")
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
    assert 2 * fuse_blocks(vae) + fuse_norms(vae) == norms > 10
    for module in vae.modules():
        if hasattr(module, "nonlinearity") and not hasattr(module, "fused"):
            assert isinstance(module.nonlinearity, nn.Identity)


def test_norms_that_ranks_share_keep_their_activation() -> None:
    vae = vae_model("kl").module
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = module.forward
    assert fuse_norms(vae) == 0
    assert any(isinstance(module, nn.SiLU) for module in vae.modules())


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("kind", ["kl", "wan", "wan_residual"])
@torch.inference_mode()
def test_shared_norms_in_fused_blocks(kind: str) -> None:
    plain, fast = vae_model(kind), vae_model(kind)
    for module in fast.module.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = module.forward
    speed_up(fast.module)
    latents = latents_of(kind, 6, 8, frames=2)
    for ours, theirs in zip(fast.codec.decode(latents), plain.codec.decode(latents), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.inference_mode()
def test_a_group_norm_by_its_channels() -> None:
    norm = nn.GroupNorm(4, 12).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    # Far from zero, and each channel elsewhere: where sums of squares would lose digits.
    x = torch.randn(2, 12, 9, 7) + 100 * torch.randn(2, 12, 1, 1)
    assert (group_norm(norm, x).double() - norm.double()(x.double())).abs().max() < 2e-5
