"""What is done to a VAE's layers for GPUs, on the CPU: the same frames."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn

from services import vae_on_gpu
from services.vae_attention import attend_by_products
from services.vae_kernels import group_norm_silu
from services.vae_on_gpu import compile_decoder, defer_biases, fuse_blocks, fuse_last_norms, seal, speed_up
from tests.parallel.vaes import CLIPS, KINDS, MOMENTS, latents_of, pixels_of, vae_model

TWO_LEVELS = {"dim_mult": [1, 2], "temperal_downsample": [True]}


@pytest.mark.parametrize("kind", KINDS)
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
def test_a_compiled_decoder_decodes_other_sizes_eagerly(monkeypatch) -> None:
    # Two levels of four: what is compiled differs in size only, and there is a compiler to wait for.
    small = replace(KINDS["wan"], make=lambda: AutoencoderKLWan(**CLIPS | TWO_LEVELS, **MOMENTS), compression=2)
    monkeypatch.setitem(KINDS, "small", small)
    plain, fast = vae_model("small"), vae_model("small")
    speed_up(fast.module)
    compile_decoder(fast.module)
    try:
        for sealed, size, frames in ((False, (6, 4), 4), (True, (6, 4), 5), (True, (5, 7), 4), (True, (5, 7), 1)):
            if sealed:
                seal()
            latents = latents_of("small", *size, frames=frames)
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
    assert 2 * fuse_blocks(vae) + fuse_last_norms(vae) == norms > 10
    for module in vae.modules():
        if hasattr(module, "nonlinearity") and not hasattr(module, "normed"):
            assert isinstance(module.nonlinearity, nn.Identity)


@pytest.mark.parametrize("kind", KINDS)
def test_every_doubling_leaves_its_bias_to_the_next_block_and_to_nobody_who_reads_it_twice(kind: str) -> None:
    vae = vae_model(kind).module
    blocks = vae.decoder.up_blocks
    doublings = [
        module for module in vae.decoder.modules() if isinstance(module, nn.Upsample) or hasattr(module, "interpolate")
    ]
    biased = sum(conv.bias is not None for conv in vae.modules() if isinstance(conv, nn.Conv2d))
    fuse_blocks(vae)
    fused = biased - sum(conv.bias is not None for conv in vae.modules() if isinstance(conv, nn.Conv2d))
    # Beside the doubling of a residual up block goes a shortcut, so that its bias is not of all that comes out.
    deferred = defer_biases(vae)
    assert deferred == (0 if kind == "wan_residual" else len(doublings))
    assert sum(block.resnets[0].bias_before is not None for block in blocks) == deferred
    left = sum(conv.bias is not None for conv in vae.modules() if isinstance(conv, nn.Conv2d))
    assert left == biased - fused - deferred


@pytest.mark.parametrize("side_by_side", [True, False])
@torch.inference_mode()
def test_clips_are_written_behind_their_history(side_by_side: bool, monkeypatch) -> None:
    rooms: list[torch.Size] = []

    def convolve_room(conv: nn.Conv3d, room: torch.Tensor) -> torch.Tensor:
        rooms.append(room.shape)
        return convolve(conv, room)

    convolve = vae_on_gpu.convolve_room
    monkeypatch.setattr(vae_on_gpu, "convolve_room", convolve_room)
    plain = vae_model("wan")
    fast = vae_model("wan")
    for module in fast.module.modules() if not side_by_side else ():
        # On GPUs most convolutions stay in 3-D.
        module.__dict__["_buffers"].pop("weight_side_by_side", None)
    fused = 2 * fuse_blocks(fast.module.decoder) + fuse_last_norms(fast.module.decoder)
    latents = latents_of("wan", 4, 6, frames=4)
    for ours, theirs in zip(fast.codec.decode(latents), plain.codec.decode(latents), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert len(rooms) == 4 * fused
    # Two frames of history before one in the first chunk, and before one, two or four in the others.
    assert {shape[2] for shape in rooms} == {3, 4, 6}
    rooms.clear()
    list(fast.codec.decode(latents_of("wan", 4, 6)))
    # A picture has no history.
    assert {shape[2] for shape in rooms} == {1}


@pytest.mark.parametrize("kind", ["kl", "wan", "wan_residual"])
@torch.inference_mode()
def test_norms_and_convolutions_that_ranks_share_are_called(kind: str) -> None:
    plain, fast = vae_model(kind), vae_model(kind)
    wrapped, called = set(), set()

    def wrap(layer: nn.Module) -> None:
        def forward_piece(x: torch.Tensor) -> torch.Tensor:
            called.add(layer)
            return forward(x)

        def gather(own: torch.Tensor) -> tuple[torch.Tensor, tuple[float, ...]]:
            called.add(layer)
            # Of two pieces that are alike.
            return torch.stack([own, own]), (0.25, 0.75)

        forward = layer.forward
        layer.forward = forward_piece
        if isinstance(layer, nn.GroupNorm):
            layer.shared = gather
        wrapped.add(layer)

    for module in fast.module.decoder.modules():
        if isinstance(module, nn.GroupNorm | nn.Conv2d | nn.Conv3d):
            wrap(module)
    speed_up(fast.module)
    latents = latents_of(kind, 6, 8, frames=2)
    for ours, theirs in zip(fast.codec.decode(latents), plain.codec.decode(latents), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert called == wrapped


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_attention_by_products(kind: str) -> None:
    plain, ours = vae_model(kind), vae_model(kind)
    assert attend_by_products(ours.module) == 2
    latents = latents_of(kind, 6, 8, frames=1)
    for got, expected in zip(ours.codec.decode(latents), plain.codec.decode(latents), strict=True):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.inference_mode()
def test_a_group_norm_by_its_channels() -> None:
    norm = nn.GroupNorm(4, 12).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    # Far from zero, and each channel elsewhere: where sums of squares would lose digits.
    x = torch.randn(2, 12, 9, 7) + 100 * torch.randn(2, 12, 1, 1)
    group_norm_silu(x, None, norm, ours := torch.empty_like(x))
    assert (ours - F.silu(norm.double()(x.double()))).abs().max() < 2e-5
