"""Kernels and compiled blocks on a GPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dit_svc.loading import _load
from services import vae_attention, vae_kernels
from services.attention import KERNELS, by_row, sdpa
from services.families import load_family
from services.linear_gelu import fuse_gelu, linear_gelu
from services.parallel.edges import Edges
from services.parallel.vae_pieces import room_around
from services.vae_attention import attend_by_products, one_head
from services.vae_on_gpu import speed_up
from services.weights import open_source
from tests.gpu.work import config_of, denoise
from tests.parallel.vaes import KINDS, latents_of, vae_model

pytestmark = pytest.mark.gpu


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_linear_with_its_gelu_is_both(rows) -> None:
    features, weight = torch.randn(rows, 100, 256).cuda().bfloat16(), torch.randn(512, 256).cuda().bfloat16()
    bias = torch.randn(512).cuda().bfloat16()
    exact = F.gelu(F.linear(features.double(), weight.double(), bias.double()), approximate="tanh")
    assert relative(linear_gelu(features, weight, bias), exact) < 4e-3


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_rows_of_unequal_length(kernel) -> None:
    query, key, value = (torch.randn(3, 70, 4, 64) for _ in range(3))
    filling = torch.tensor([0, 7, 30])
    expected = sdpa(query, key, value, filling)
    ours = by_row(*(tensor.cuda().bfloat16() for tensor in (query, key, value)), filling, kernel)
    assert relative(ours.cpu(), expected) < 2e-2


@pytest.mark.parametrize("family, variant", [("qwen_image", "t2i"), ("flux", "dev"), ("wan", "t2v")])
def test_compiled_blocks_never_recompile_and_give_what_eager_ones_give(family, variant, tmp_path) -> None:
    load_family(family).tiny(tmp_path, variant, 0)
    with torch.inference_mode():
        eager, _ = denoise(config_of(tmp_path, "float32", {}, {}), None, 12)
        compiled, figures = denoise(
            config_of(tmp_path, "float32", {}, {"attention": {"backend": "sdpa"}, "compile": {}}), None, 12
        )
    assert figures["dit_recompiles_total"] == 0
    assert eager.keys() == compiled.keys()
    for name, latents in eager.items():
        assert relative(compiled[name], latents) < 1e-2, name


@pytest.mark.parametrize(
    "family, variant", [("qwen_image", "t2i"), ("flux", "dev"), ("hidream", "full"), ("wan", "i2v")]
)
def test_random_weights_that_leave_the_gpu_are_those_that_stay(family, variant, tmp_path) -> None:
    part, gpu = load_family(family).dit, torch.device("cuda")
    load_family(family).tiny(tmp_path, variant, 0)
    source = open_source(str(tmp_path)).without_weights()
    staying = part.load(source, gpu, torch.bfloat16)
    leaving = part.load(replace(source, drawn_on=gpu), torch.device("cpu"), torch.bfloat16)
    for name, module in staying.modules.items():
        left = leaving.modules[name].state_dict()
        assert all(torch.equal(kept.cpu(), left[key]) for key, kept in module.state_dict().items())


def test_random_weights_of_a_full_size_model_leave_the_gpu_as_they_are_made() -> None:
    source, gpu = open_source("random:0", family="wan", preset="wan2.1-t2v-1.3b"), torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_family("wan").dit.load(replace(source, drawn_on=gpu), torch.device("cpu"), torch.bfloat16)
    size = sum(weight.nbytes for module in model.modules.values() for weight in module.parameters())
    assert torch.cuda.max_memory_allocated() - before < 0.05 * size


def test_an_idle_expert_waits_in_the_hosts_memory(tmp_path) -> None:
    load_family("wan").tiny(tmp_path, "t2v", 0)
    resident = config_of(tmp_path, "float32", {}, {})
    offloaded = replace(resident, engine=replace(resident.engine, offload_experts=True))
    with torch.inference_mode():
        expected, _ = denoise(resident, None, 6)
        latents, _ = denoise(offloaded, None, 6)
    assert latents.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative(latents[name], tensor) < 1e-5, name


def test_random_weights_of_idle_experts_are_those_of_resident_ones(tmp_path) -> None:
    load_family("wan").tiny(tmp_path, "t2v", 0)
    source = open_source(str(tmp_path)).without_weights()
    resident = config_of(tmp_path, "float32", {}, {})
    offloaded = replace(resident, engine=replace(resident.engine, offload_experts=True))
    (ours, _), (expected, _) = (_load(config, source, load_family("wan").dit, None) for config in (offloaded, resident))
    for name, module in expected.modules.items():
        waiting = dict(ours.modules[name].named_parameters())
        assert all(torch.equal(waiting[key], parameter.cpu()) for key, parameter in module.named_parameters())


def test_gelu_is_fused_where_it_can_be(tmp_path) -> None:
    from diffusers.models.attention import FeedForward

    assert fuse_gelu(FeedForward(32, activation_fn="gelu-approximate")) == 1
    assert fuse_gelu(FeedForward(32, activation_fn="gelu")) == 0
    assert fuse_gelu(FeedForward(32, activation_fn="gelu-approximate", bias=False)) == 0


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def kernels() -> Any:
    from services import vae_kernels_cuda

    return vae_kernels_cuda


def tolerance(dtype: torch.dtype) -> float:
    return 5e-6 if dtype == torch.float32 else 4e-3


def on_gpu(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Noise, channels last."""
    layout = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    return torch.randn(shape).cuda().to(dtype, memory_format=layout)


@pytest.mark.parametrize("batch, width", [(1, 96), (2, 12), (1, 384), (1, 640)])
@torch.inference_mode()
def test_an_rms_norm_is_written_behind_the_history(batch, width, dtype, kernels) -> None:
    x, bias, gamma = on_gpu(batch, width, 4, 31, 17, dtype=dtype), *torch.randn(2, width).cuda().to(dtype)
    for first in (None, bias):
        room = torch.full_like(on_gpu(batch, width, 6, 31, 17, dtype=dtype), 7)
        kernels.rms_norm_silu(x, first, gamma, room[:, :, 2:])
        exact = torch.empty_like(x, dtype=torch.float64)
        vae_kernels.rms_norm_silu(x.double(), None if first is None else first.double(), gamma.double(), exact)
        assert relative(room[:, :, 2:], exact) < tolerance(dtype)
        assert (room[:, :, :2] == 7).all()


@pytest.mark.parametrize("batch, width, groups, sides", [(2, 12, 4, (9, 7)), (1, 160, 32, (40, 37))])
@pytest.mark.parametrize("blocks", [1024, 3])
@torch.inference_mode()
def test_a_group_norm_by_its_channels(batch, width, groups, sides, blocks, dtype, kernels, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCKS", blocks)
    norm = torch.nn.GroupNorm(groups, width).cuda()
    norm.weight.normal_()
    norm.bias.normal_()
    norm.to(dtype)
    # Each channel elsewhere, and in float32 far from zero: where sums of squares would lose digits.
    far = 100 if dtype == torch.float32 else 3
    x = (on_gpu(batch, width, *sides, dtype=dtype) + far * on_gpu(batch, width, 1, 1, dtype=dtype)).contiguous(
        memory_format=torch.channels_last
    )
    bias = torch.randn(width).cuda().to(dtype)
    exact = copy.deepcopy(norm).double()
    for first in (None, bias):
        whole = x.double() if first is None else x.double() + first.double()[:, None, None]
        expected = F.silu(exact(whole))
        # Inside of something larger; of the whole, and of two pieces of it, each of which knows of both.
        room = torch.zeros_like(F.pad(x, (1, 2, 2, 1)))
        kernels.group_norm_silu(x, first, norm, room[:, :, 2:-1, 1:-2])
        assert relative(room, F.pad(expected, (1, 2, 2, 1))) < tolerance(dtype)
        heights = [3, x.shape[2] - 3]
        shares = tuple(height / x.shape[2] for height in heights)
        pieces = [
            (piece.contiguous(memory_format=torch.channels_last), part)
            for piece, part in zip(x.split(heights, dim=2), expected.split(heights, dim=2), strict=True)
        ]
        moments = torch.stack([kernels._moments_of(piece, first, groups) for piece, _ in pieces])
        for piece, part in pieces:
            kernels.group_norm_silu(piece, first, norm, ours := torch.empty_like(piece), lambda _: (moments, shares))  # noqa: B023
            assert relative(ours, part) < tolerance(dtype)


@pytest.mark.parametrize("width", [12, 96, 512])
@torch.inference_mode()
def test_sums_and_doubled_pictures(width, dtype, kernels) -> None:
    shortcut, x = on_gpu(1, width, 3, 31, 17, dtype=dtype), on_gpu(1, width, 3, 31, 17, dtype=dtype)
    bias = torch.randn(width).cuda().to(dtype)
    exact = vae_kernels.add(shortcut.double(), x.double(), bias.double())
    assert relative(kernels.add(shortcut, x, bias), exact) < tolerance(dtype)
    picture = on_gpu(2, width, 31, 17, dtype=dtype)
    ours, theirs = (on_gpu(2, width, 65, 37, dtype=dtype) for _ in range(2))
    for doubled, module in ((ours, kernels), (theirs, vae_kernels)):
        doubled.zero_()
        module.double(picture, doubled[:, :, 2:-1, 1:-2])
    assert torch.equal(ours, theirs) and torch.equal(ours[:, :, 2:-1:2, 1:-2:2], picture)


@pytest.mark.parametrize("batch, width, count", [(1, 96, 3), (2, 12, 3), (1, 16, 1)])
@torch.inference_mode()
def test_frames_side_by_side_for_sums_in_2d(batch, width, count, dtype, kernels) -> None:
    clip = on_gpu(batch, width, 6, 31, 17, dtype=dtype)
    ours = kernels.side_by_side(clip, count)
    assert torch.equal(ours, vae_kernels.side_by_side(clip, count))
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [100, 6240, 16384])
@torch.inference_mode()
def test_sums_of_a_softmax(count, kernels) -> None:
    scores = 20 * torch.randn(5, count).cuda()
    exact = (scores.double() / 3).softmax(-1)
    assert relative(kernels.softmax(scores, 1 / 3, torch.float32), exact) < 1e-5
    assert relative(kernels.softmax(scores, 1 / 3, torch.bfloat16), exact) < tolerance(torch.bfloat16)


@torch.inference_mode()
def test_sums_of_attention_by_products(monkeypatch) -> None:
    monkeypatch.setattr(vae_attention, "MAX_SCORES", 300_000)
    query, key, value = (torch.randn(2, 700, 384).cuda().bfloat16() for _ in range(3))
    ours, fused = (one_head(query, key, value), F.scaled_dot_product_attention(query, key, value))
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    # Weights are rounded before the second product in both; the largest of 500,000 errors varies.
    assert relative(ours, exact) < 2 * relative(fused, exact)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_frames_of_a_vae_are_those_of_the_cpu(kind, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain, fast = vae_model(kind), vae_model(kind)
    fast.module.cuda()
    attend_by_products(fast.module)
    speed_up(fast.module)
    for size, frames in (((12, 8), 3), ((7, 9), 1)):
        latents = latents_of(kind, *size, frames=frames)
        for ours, theirs in zip(fast.codec.decode(latents.cuda()), plain.codec.decode(latents), strict=True):
            assert relative(ours.cpu(), theirs) < 1e-4


@pytest.mark.parametrize("before, behind", [(1, 1), (0, 1), (2, 1)])
@pytest.mark.parametrize("dim", [-2, -1])
@torch.inference_mode()
def test_a_piece_between_two_others_gets_the_edges_of_both(dim, before, behind, dtype) -> None:
    from services.parallel.edges_cuda import FLAG_BYTES, exchange

    # On one GPU three streams are the ranks.
    sizes, streams = (11, 9, 10), [torch.cuda.Stream() for _ in range(3)]
    pictures = [on_gpu(2, 96, 3, 30, 30, dtype=dtype) for _ in range(3)]

    def rooms_of(picture: torch.Tensor) -> list[torch.Tensor]:
        return [room_around(piece, dim, before, behind) for piece in picture.split(sizes, dim)]

    edges = [Edges.of(room, dim, before, behind) for room in rooms_of(pictures[0])]
    inbox_bytes = (edges[0].count_before + edges[0].count_behind) * edges[0].word.itemsize
    memory = torch.zeros(3, FLAG_BYTES + 2 * inbox_bytes, dtype=torch.uint8).cuda()

    def meet(rooms: list[torch.Tensor], number: int) -> None:
        for rank, stream in enumerate(streams):
            seen = [memory[other] if 0 <= other < 3 else None for other in (rank, rank - 1, rank + 1)]
            with torch.cuda.stream(stream):
                exchange(rooms[rank], seen, number, FLAG_BYTES + number % 2 * inbox_bytes, edges[rank])

    spare = rooms_of(pictures[0])
    torch.cuda.synchronize()
    # Kernels are loaded while none runs: all flags are at its number, so nobody waits in this exchange.
    meet(spare, 0)
    # Behind the largest number comes the smallest one.
    for last in (0, 2**31 - 2):
        torch.cuda.synchronize()
        memory[:, :FLAG_BYTES].view(torch.int32).fill_(last)
        all_rooms = [rooms_of(picture) for picture in pictures]
        torch.cuda.synchronize()
        for index, rooms in enumerate(all_rooms, 1):
            meet(rooms, (last + index + 2**31) % 2**32 - 2**31)
        torch.cuda.synchronize()
        for picture, rooms in zip(pictures, all_rooms, strict=True):
            whole = F.pad(picture, (0, 0, before, behind) if dim == -2 else (before, behind))
            for rank, room in enumerate(rooms):
                assert torch.equal(room, whole.narrow(dim, sum(sizes[:rank]), sizes[rank] + before + behind))


@pytest.mark.parametrize("branches", ["serial", "rows"])
@torch.inference_mode()
def test_graphs_are_of_compiled_blocks(branches, tmp_path) -> None:
    load_family("qwen_image").tiny(tmp_path, "t2i", 0)
    config = config_of(tmp_path, "bfloat16", {}, {"attention": {}, "compile": {}, "graphs": {"after": 1}})
    config = replace(config, engine=replace(config.engine, branches=branches))
    _, figures = denoise(config, None, 4)
    assert figures["dit_graph_replays_total"] > 0
    assert figures["dit_recompiles_total"] == 0


@torch.inference_mode()
def test_graphs_that_go_one_by_one_change_no_bit(tmp_path) -> None:
    """What the last gave is still held when the next is made."""
    load_family("qwen_image").tiny(tmp_path, "t2i", 0)
    features = {"attention": {}, "compile": {}}
    plain, _ = denoise(config_of(tmp_path, "bfloat16", {}, features), None, 8)
    replayed, figures = denoise(
        config_of(tmp_path, "bfloat16", {}, features | {"graphs": {"after": 1, "kept": 1}}), None, 8
    )
    assert figures["dit_graph_replays_total"] > 0
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)
