"""Pictures between two pictures: both ways count alike, and flow is corrected by what the pictures show."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from interpolation_svc.between import MAX_STEP_PX, corrected, pictures_between
from interpolation_svc.ifnet import MULTIPLE_PX, IFNet, IFNetSpec
from interpolation_svc.weights import PACKAGED, load_ifnet

SIDE_PX = 96
TRAVEL = (5.4, -2.7)
INNER = (..., slice(16, -16), slice(16, -16))


def texture(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Colours [3, ...] at any point: waves of several lengths and directions."""
    generator = torch.Generator().manual_seed(0)
    waves = []
    for length in (7.0, 11.0, 17.0, 29.0, 47.0):
        angle, *phases = (2 * math.pi * torch.rand(4, generator=generator)).tolist()
        along = 2 * math.pi / length * (x * math.cos(angle) + y * math.sin(angle))
        waves.append(torch.stack([torch.sin(along + phase) for phase in phases]))
    return 0.5 + 0.09 * torch.stack(waves).sum(0)


def picture(time: float) -> torch.Tensor:
    """The texture on its way: [1, 3, S, S]."""
    axis = torch.arange(SIDE_PX).float()
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return texture(x - time * TRAVEL[0], y - time * TRAVEL[1])[None]


def field(x: float, y: float, count: int = 1) -> torch.Tensor:
    return torch.tensor([x, y]).view(1, 2, 1, 1).expand(count, 2, SIDE_PX, SIDE_PX)


def error_px(motion: torch.Tensor) -> float:
    return (motion - field(*TRAVEL))[INNER].square().sum(1).sqrt().mean().item()


@pytest.mark.parametrize("encodes", [True, False], ids=["4.22.lite", "4.6"])
def test_both_ways_count_alike(encodes: bool) -> None:
    torch.manual_seed(0)
    net = IFNet(IFNetSpec((16, 12, 8, 8), encodes)).eval().requires_grad_(False)
    first, second = net.encode_pictures(torch.rand(4, 3, 36, 40)).chunk(2)
    time = torch.tensor([0.25, 0.5])
    there, back = pictures_between(net, first, second, time), pictures_between(net, second, first, 1 - time)
    assert there.shape == (2, 3, 36, 40)
    assert there.min() >= 0 and there.max() <= 1
    torch.testing.assert_close(there, back, atol=1e-5, rtol=0)


@pytest.mark.parametrize("time", [0.5, 0.125])
def test_a_motion_that_is_a_little_off_is_corrected(time: float) -> None:
    ends, at = torch.cat([picture(0), picture(1)]), torch.full((1, 1, 1, 1), time)
    guess = field(TRAVEL[0] + 0.6, TRAVEL[1] - 0.5)
    once = corrected(guess, ends, at)
    assert error_px(once) < 0.25 * error_px(guess)
    assert error_px(corrected(field(*TRAVEL), ends, at)) < 0.03, "what is right stays"


def test_each_picture_of_a_batch_has_its_own_time() -> None:
    ends = torch.cat([picture(0), picture(0), picture(1), picture(1)])
    guess, times = field(TRAVEL[0] + 0.4, TRAVEL[1], 2), torch.tensor([0.25, 0.75]).view(2, 1, 1, 1)
    together = corrected(guess, ends, times)
    for index in range(2):
        alone = corrected(guess[:1], ends[index::2], times[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=0)


def test_a_step_is_small_and_where_nothing_is_seen_there_is_none() -> None:
    half = torch.full((1, 1, 1, 1), 0.5)
    flat = torch.cat([torch.full((1, 3, SIDE_PX, SIDE_PX), value) for value in (0.4, 0.6)])
    torch.testing.assert_close(corrected(field(3.0, 1.0), flat, half), field(3.0, 1.0))
    others = torch.rand(2, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(1))
    step = corrected(field(3.0, 1.0), others, half) - field(3.0, 1.0)
    assert 0 < step.abs().max() <= MAX_STEP_PX + 1e-5


@pytest.mark.parametrize("time", [0.5, 0.25])
def test_the_shipped_weights_make_better_pictures_so(time: float) -> None:
    net, at = load_ifnet(PACKAGED), torch.tensor([time])
    first, second = net.encode_pictures(picture(0)), net.encode_pictures(picture(1))

    def decibels(made: torch.Tensor) -> float:
        return -10 * math.log10((made - picture(time))[INNER].square().mean().item())

    plain, ours = net(first, second, at).picture(), pictures_between(net, first, second, at)
    assert decibels(ours) > decibels(plain) + 2


def test_only_the_coarse_blocks_see_more_of_a_coarse_scale() -> None:
    net = IFNet(IFNetSpec((16, 12, 8, 8), encodes=True)).eval().requires_grad_(False)
    seen: list[tuple[int, ...]] = []
    for block in (net.block0, net.block1, net.block2, net.block3):
        block.conv0.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    first, second = net.encode_pictures(torch.rand(2, 3, 160, 320)).chunk(2)
    net(first, second, torch.tensor([0.5]), coarse_scale=1.25)
    assert seen == [(24, 48), (48, 100), (80, 160), (160, 320)]


@pytest.mark.parametrize("size", [(4, 4), (36, 52), (100, 44)], ids=str)
def test_sizes_need_no_more_than_a_multiple_of_four(size: tuple[int, int]) -> None:
    assert MULTIPLE_PX == 4
    net = load_ifnet(PACKAGED)
    coarse = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    first, second = net.encode_pictures(F.interpolate(coarse, size, mode="bilinear")).chunk(2)
    assert pictures_between(net, first, second, torch.tensor([0.5])).isfinite().all()
