"""What the frame interpolator is worth on clips that training never saw, next to blending both pictures."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from demo.interpolation.layers import FAR, NEAR, Painter, Ranges, sample_clips
from interpolation_svc.between import pictures_between
from interpolation_svc.ifnet import IFNet

BATCH = 8
BEST_DB = 60.0
"""What an error that cannot be seen counts as: without it, clips in which nothing moves would be worth any number."""


@torch.no_grad()
def evaluate(net: IFNet, painter: Painter, count: int, side_px: int) -> Iterator[str]:
    """Lines of a report: photographs, near and far, and the demo's scenes, half and a quarter of the way."""
    for kind, plain_share, ranges in (
        ("photographs", 0.0, NEAR),
        ("photographs that move far", 0.0, FAR),
        ("demo scenes", 1.0, NEAR),
    ):
        for wanted in (0.5, 0.25):
            ours, blend = mean_psnr(
                net, painter, count=count, side_px=side_px, wanted=wanted, plain_share=plain_share, ranges=ranges
            )
            yield f"held-out {kind} at {wanted}: {ours:.2f} dB, blending {blend:.2f} dB, gain {ours - blend:.2f} dB"


@torch.no_grad()
def mean_psnr(
    net: IFNet, painter: Painter, *, count: int, side_px: int, wanted: float, plain_share: float, ranges: Ranges
) -> tuple[float, float]:
    """Mean PSNR in dB over `count` clips of the network and of blending; the clips are the same at every call."""
    generator = torch.Generator().manual_seed(1)
    device = painter.tiles.device
    ours, blend = [], []
    for _ in range(0, count, BATCH):
        clips = sample_clips(BATCH, side_px, len(painter.tiles), generator, plain_share=plain_share, ranges=ranges).to(
            device
        )
        first, target, second = (
            painter.picture(clips, torch.full((BATCH,), moment, device=device)) for moment in (0.0, wanted, 1.0)
        )
        ends = net.encode_pictures(first), net.encode_pictures(second)
        picture = pictures_between(net, *ends, torch.full((BATCH,), wanted, device=device))
        ours.append(psnr(picture, target))
        blend.append(psnr(torch.lerp(first, second, wanted), target))
    return torch.cat(ours).mean().item(), torch.cat(blend).mean().item()


def psnr(picture: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """In dB, of each picture [N, 3, H, W] in [0, 1]."""
    error = (picture - target).square().flatten(1).mean(1)
    return (-10 * torch.log10(error)).clamp(max=BEST_DB)
