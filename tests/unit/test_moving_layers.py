"""The clips that the frame interpolator is trained on: what is drawn moves as the flow says it does."""

from collections.abc import Callable

import pytest
import torch

from demo.interpolation.evaluate import mean_psnr
from demo.interpolation.layers import FAR, LAYERS, NEAR, Painter, sample_clips
from demo.interpolation.photographs import TILE_PX
from demo.interpolation.train import SPEC, Triples, draw_triples, loss_of, served_loss_of
from interpolation_svc.between import pictures_between
from interpolation_svc.ifnet import IFNet, IFNetSpec, warp
from interpolation_svc.weights import PACKAGED, load_ifnet

SIDE_PX = 96


def painter() -> Painter:
    smooth = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return Painter(torch.nn.functional.interpolate(smooth, (TILE_PX, TILE_PX), mode="bicubic").clamp(0, 1))


def test_pictures_warped_by_the_true_flow_are_the_wanted_one_but_for_what_is_hidden() -> None:
    artist, count = painter(), 12
    clips = sample_clips(count, SIDE_PX, 3, torch.Generator().manual_seed(0), plain_share=0)
    first, second = (artist.draw(clips, torch.full((count,), end))[0] for end in (0.0, 1.0))
    target, flow = artist.draw(clips, torch.full((count,), 0.3))
    errors = [(warp(x, part) - target).abs().amax(1) for x, part in ((first, flow[:, :2]), (second, flow[:, 2:]))]
    blend = (torch.lerp(first, second, 0.3) - target).abs().amax(1)
    # What neither picture shows is rare; at edges, which are mixed colours, the flow of one layer cannot be right.
    assert torch.minimum(*errors).gt(0.03).float().mean() < 0.05
    assert blend.gt(0.03).float().mean() > 0.15


def test_clips_move_by_what_was_promised_and_half_of_the_depths_are_used() -> None:
    near = sample_clips(64, 256, 3, torch.Generator().manual_seed(0), ranges=NEAR).motion.travel.norm(dim=-1)
    assert 20 < near.max() <= 24
    clips = sample_clips(64, SIDE_PX, 3, torch.Generator().manual_seed(0))
    travel = clips.motion.travel.norm(dim=-1)
    assert FAR.travel * SIDE_PX < travel.max() <= (FAR.travel + FAR.pan) * SIDE_PX
    shown = clips.look.offset.view(-1, LAYERS).le(0).sum(1)
    assert set(shown.tolist()) == set(range(1, LAYERS + 1))


def test_a_camera_moves_all_layers_alike_and_half_of_all_cameras_stand_still() -> None:
    travel = sample_clips(400, SIDE_PX, 3, torch.Generator().manual_seed(0)).motion.travel.view(-1, LAYERS, 2)
    stands = travel.norm(dim=-1).lt(1e-6)
    shares = [stands.sum(1).ge(2), stands.any(1)]
    assert 0.02 < shares[0].float().mean() < 0.1
    assert 0.15 < shares[1].float().mean() < 0.27


def test_pictures_alone_are_those_that_come_with_the_flow() -> None:
    artist, time = painter(), torch.full((4,), 0.3)
    clips = sample_clips(4, SIDE_PX, 3, torch.Generator().manual_seed(0))
    assert torch.equal(artist.picture(clips, time), artist.draw(clips, time)[0])


def test_a_scene_of_the_demo_has_plain_colours_only() -> None:
    clips = sample_clips(4, SIDE_PX, 3, torch.Generator().manual_seed(0), plain_share=1)
    picture, _ = painter().draw(clips, torch.full((4,), 0.5))
    for one in picture:
        colours, sizes = one.flatten(1).unique(dim=1, return_counts=True)
        assert sizes.topk(min(LAYERS, len(sizes))).values.sum() > 0.9 * SIDE_PX**2, "more than flat shapes"


@pytest.mark.parametrize("loss", [loss_of, served_loss_of])
def test_training_reaches_every_weight_and_the_checkpoint_stays_small(
    loss: Callable[[IFNet, Triples], tuple[torch.Tensor, ...]],
) -> None:
    artist, generator = painter(), torch.Generator().manual_seed(0)
    net = IFNet(IFNetSpec((16, 12, 8, 8), encodes=True))
    triples = draw_triples(artist, sample_clips(2, SIDE_PX, 3, generator), generator)
    loss(net, triples)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    assert 2 * sum(p.numel() for p in IFNet(SPEC).parameters()) < 5e6


def test_what_counts_as_served_is_the_picture_that_is_served() -> None:
    artist, generator = painter(), torch.Generator().manual_seed(0)
    net = load_ifnet(PACKAGED)
    triples = draw_triples(artist, sample_clips(2, SIDE_PX, 3, generator), generator)
    ends = net.encode_pictures(triples.first), net.encode_pictures(triples.second)
    served = pictures_between(net, *ends, triples.times)
    _, error, _ = served_loss_of(net, triples)
    torch.testing.assert_close(error, (served - triples.wanted).square().mean())


def test_blending_is_judged_alike_at_every_call() -> None:
    net = IFNet(IFNetSpec((16, 12, 8, 8), encodes=True))
    first, again = (
        mean_psnr(net, painter(), count=8, side_px=SIDE_PX, wanted=0.5, plain_share=0.5, ranges=NEAR) for _ in range(2)
    )
    assert first == again
    assert 10 < first[1] < 60
