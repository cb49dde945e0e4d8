"""Pictures between two pictures: what the service makes of IFNet's estimates.

The network is asked both ways, from the first to the second and from the second to the first, in one batch; what its
two answers are wrong in differs, and the mean of their pictures is nearer to the truth than either. Before that, each
answer's flow is made even (between two pictures things move on straight lines, at one speed) and corrected by where the
pictures it brings together still differ (Lucas and Kanade 1981, one step): the network sees detail at a quarter of its
size, this at the full size. The last sampling is bicubic, which keeps fine detail.

Letters of shapes: B pictures, C planes, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from interpolation_svc.ifnet import Estimate, IFNet, warp

COARSE_SCALE = 1.25
"""The two coarse blocks see a little more than in training; chosen on photographs (docs/interpolation.md)."""
WINDOW_PX = 9
"""Side of the square whose pixels are taken to move alike when flow is corrected."""
MAX_STEP_PX = 1.0
LEAST_SLOPE = 0.003
"""Of brightness over a pixel: where there is less, there is nothing to correct by."""
NOISE = 0.01
"""Of brightness: a pixel that differs by more counts less, as it may be hidden in one picture."""


def pictures_between(
    net: IFNet, first: torch.Tensor, second: torch.Tensor, time: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """The pictures [B, 3, H, W] in [0, 1] at times [B] in (0, 1) between encoded ones [B, C, H, W], float32.

    `scale` is that of the flow's resolution, as in `IFNet`.
    """
    estimate = net(*both_ways(first, second, time), scale, COARSE_SCALE)
    return pictures_of(estimate, first[:, :3], second[:, :3], time)


def both_ways(
    first: torch.Tensor, second: torch.Tensor, time: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `IFNet` is asked: from first [B, C, H, W] to second at times [B], then from second to first, [2B, ...]."""
    return torch.cat([first, second]), torch.cat([second, first]), torch.cat([time, 1 - time])


def pictures_of(estimate: Estimate, first: torch.Tensor, second: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The pictures [B, 3, H, W] that an estimate for `both_ways` makes of the pictures alone, [B, 3, H, W] each."""
    forth, back = (estimate.flow[:, 2:] - estimate.flow[:, :2]).chunk(2)
    mix, mix_back = estimate.mix.chunk(2)
    share = torch.sigmoid(torch.cat([mix, -mix_back]))
    ends = torch.cat([pictures.repeat(2, 1, 1, 1) for pictures in (first, second)])
    time = time.to(first).repeat(2).view(-1, 1, 1, 1)
    motion = corrected(torch.cat([forth, -back]), ends, time)
    at_first, at_second = warp(ends, _flows(motion, time), "bicubic").clamp(0, 1).chunk(2)
    forth, back = torch.lerp(at_second, at_first, share).chunk(2)
    return (forth + back) / 2


def corrected(motion: torch.Tensor, ends: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The motion [B, 2, H, W] (pixels from first to second; x, y) that brings the two pictures nearer to each other.

    Args:
        ends: the first pictures and then the second, [2B, 3, H, W].
        time: when the points that move are at their own pixel, [B, 1, 1, 1].
    """
    first, second = warp(ends, _flows(motion, time)).chunk(2)
    apart = first - second
    across, down = _slopes(torch.lerp(first, second, time))
    trust = NOISE / (apart.abs().mean(1, keepdim=True) + NOISE)
    terms = [across * across, across * down, down * down, across * apart, down * apart]
    sums = torch.stack([(trust * term).mean(1) for term in terms], 1)
    sums = F.avg_pool2d(sums, WINDOW_PX, 1, WINDOW_PX // 2, count_include_pad=False)
    # The least squares of apart = across * x + down * y over the window, drawn towards no step.
    xx, xy, yy, x, y = sums.split(1, 1)
    xx, yy = xx + LEAST_SLOPE**2, yy + LEAST_SLOPE**2
    step = torch.cat([yy * x - xy * y, xx * y - xy * x], 1) / (xx * yy - xy * xy)
    moved: torch.Tensor = motion + step.clamp(-MAX_STEP_PX, MAX_STEP_PX)
    return moved


def _flows(motion: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """From the pictures between to the first and then to the second, [2B, 2, H, W]."""
    return torch.cat([-time * motion, (1 - time) * motion])


def _slopes(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Change of brightness over a pixel, to the right and down."""
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return across, down
