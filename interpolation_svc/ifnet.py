"""IFNet, the network of RIFE: two pictures and a time between them give the picture of that time.

From the wanted time, a flow to either picture and a map of how the two are mixed are estimated together, coarse to
fine: every block looks at both pictures as the flow so far warps them, at a resolution of its own, and corrects.

Own implementation of two published architectures, under the names of their weights. They differ in what a block knows:
4.6 sees pixels and corrects the mix; 4.22.lite also sees four encoded planes of each picture and eight planes that the
block before hands on, and makes the mix anew. The flow and everything that is warped stay in float32; the convolutions
run in the dtype of their weights.

Source: RIFE, arXiv 2011.06294; layer sizes and key names as in the weight files published with Practical-RIFE.
Letters of shapes: N pictures, B pairs, C planes of a picture, H W pixels (multiples of `MULTIPLE_PX`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

MULTIPLE_PX = 4
COARSEST = 8
ENCODED = 4
HANDED_ON = 8
RESIDUAL_LAYERS = 8
SLOPE = 0.2


@dataclass(frozen=True, slots=True)
class IFNetSpec:
    """`widths`: channels of the blocks, coarse to fine. `encodes`: whether pictures are encoded, as from 4.7 on."""

    widths: tuple[int, int, int, int]
    encodes: bool


V4_6 = IFNetSpec((192, 128, 96, 64), encodes=False)
V4_22_LITE = IFNetSpec((192, 128, 64, 32), encodes=True)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is known of the wanted picture after a block.

    Shapes: flow [B, 4, H, W], pixels from the wanted picture to the first (x, y), then to the second; mix [B, 1, H, W],
    the first's share as a logit; planes [2B, C, H, W], those of the first and of the second, warped.
    """

    flow: torch.Tensor
    mix: torch.Tensor
    planes: torch.Tensor

    def picture(self) -> torch.Tensor:
        """The wanted picture: [B, 3, H, W] in [0, 1]."""
        first, second = self.planes[:, :3].chunk(2)
        return torch.lerp(second, first, torch.sigmoid(self.mix))


class IFNet(nn.Module):
    """Pictures become planes once (`encode_pictures`); any pair of them then gives pictures of any time between."""

    def __init__(self, spec: IFNetSpec) -> None:
        super().__init__()
        self.spec = spec
        planes, time = 3 + ENCODED * spec.encodes, 1
        known = 2 * planes + time + 1 + HANDED_ON * spec.encodes + 4
        out = 4 + 1 + (HANDED_ON if spec.encodes else 1)  # Files of 4.6 have a sixth channel that means nothing.
        self.block0 = IFBlock(2 * planes + time, spec.widths[0], out)
        self.block1 = IFBlock(known, spec.widths[1], out)
        self.block2 = IFBlock(known, spec.widths[2], out)
        self.block3 = IFBlock(known, spec.widths[3], out)
        if spec.encodes:
            self.encode = PictureEncoder()

    def encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 3, H, W] in [0, 1] to planes [N, C, H, W], float32: the colours, and what was encoded."""
        pictures = pictures.float().clamp(0, 1)
        return torch.cat([pictures, self.encode(pictures)], 1) if self.spec.encodes else pictures

    def forward(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        time: torch.Tensor,
        scale: float = 1.0,
        coarse_scale: float = 1.0,
    ) -> Estimate:
        """The last estimate for planes [B, C, H, W] of two pictures and times [B] in (0, 1)."""
        *_, last = self.estimates(first, second, time, scale, coarse_scale)
        return last

    def estimates(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        time: torch.Tensor,
        scale: float = 1.0,
        coarse_scale: float = 1.0,
    ) -> Iterator[Estimate]:
        """Coarse to fine.

        `scale` is that of the flow's resolution: below 1 for large pictures, above 1 for small. That of the two coarse
        blocks is multiplied by `coarse_scale`.
        """
        planes = torch.cat([first, second])
        time = time.to(planes).view(-1, 1, 1, 1).expand(-1, 1, *planes.shape[2:])
        warped, flow, mix = planes, None, None
        kept: list[torch.Tensor] = []
        for level, block in enumerate((self.block0, self.block1, self.block2, self.block3)):
            one, other = warped.chunk(2)
            seen = [one[:, :3], other[:, :3], one[:, 3:], other[:, 3:], time, *kept]
            coarseness = COARSEST / 2**level / scale / (coarse_scale if level < 2 else 1)
            change, score, handed_on = block(torch.cat(seen, 1), flow, coarseness)
            flow = change if flow is None else flow + change
            mix = score if mix is None or self.spec.encodes else mix + score
            kept = [mix, handed_on] if self.spec.encodes else [mix]
            warped = warp(planes, torch.cat(flow.chunk(2, 1)))
            yield Estimate(flow, mix, warped)


class PictureEncoder(nn.Module):
    """Four planes of features at the picture's own size, from half of it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.cnn0 = nn.Conv2d(3, width, 3, 2, 1)
        self.cnn1 = nn.Conv2d(width, width, 3, 1, 1)
        self.cnn2 = nn.Conv2d(width, width, 3, 1, 1)
        self.cnn3 = nn.ConvTranspose2d(width, ENCODED, 4, 2, 1)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] to float32 [N, 4, H, W]."""
        x = pictures.to(self.cnn0.weight.dtype)
        for layer in (self.cnn0, self.cnn1, self.cnn2):
            x = F.leaky_relu(layer(x), SLOPE)
        planes: torch.Tensor = self.cnn3(x)
        return planes.float()


class ResidualLayer(nn.Module):
    """A convolution whose share in the sum is learned for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1)
        self.beta = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(torch.addcmul(x, self.conv(x), self.beta), SLOPE)


class IFBlock(nn.Module):
    """Corrects the flow at one resolution: a quarter of it inside, after two strided convolutions."""

    def __init__(self, channels: int, width: int, out: int) -> None:
        super().__init__()
        # Nested, as the published names have it: conv0.0.0, conv0.1.0.
        self.conv0 = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, width // 2, 3, 2, 1), nn.LeakyReLU(SLOPE)),
            nn.Sequential(nn.Conv2d(width // 2, width, 3, 2, 1), nn.LeakyReLU(SLOPE)),
        )
        self.convblock = nn.Sequential(*(ResidualLayer(width) for _ in range(RESIDUAL_LAYERS)))
        self.lastconv = nn.Sequential(nn.ConvTranspose2d(width, 4 * out, 4, 2, 1), nn.PixelShuffle(2))

    def forward(
        self, seen: torch.Tensor, flow: torch.Tensor | None, coarseness: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What to add to the flow [B, 4, H, W], what to say of the mix [B, 1, H, W], and planes to hand on.

        `coarseness`: pixels of the picture to one that the block works on, 1/4 to 32.
        """
        height, width = seen.shape[2:]
        size = (_level_px(height, coarseness), _level_px(width, coarseness))
        across, down = width / size[1], height / size[0]
        if flow is not None:
            seen = torch.cat([seen, _stretch(flow, 1 / across, 1 / down)], 1)
        seen = _resize(seen, size).to(next(self.parameters()).dtype)
        out = self.lastconv(self.convblock(self.conv0(seen))).float()
        out = _resize(out, (height, width))
        return _stretch(out[:, :4], across, down), out[:, 4:5], out[:, 5:]


def warp(planes: torch.Tensor, flow: torch.Tensor, sampling: str = "bilinear") -> torch.Tensor:
    """What `flow` [N, 2, H, W] (pixels; x, y) points at in `planes` [N, C, H, W]; beyond the border, the border's.

    `sampling` between pixels: "bilinear", or "bicubic", which may overshoot.
    """
    height, width = planes.shape[2:]
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device).view(-1, 1) + flow[:, 1]
    grid = torch.stack([x * (2 / (width - 1)) - 1, y * (2 / (height - 1)) - 1], -1)
    return F.grid_sample(planes, grid, mode=sampling, padding_mode="border", align_corners=True)


def _level_px(side_px: int, coarseness: float) -> int:
    return max(4, 4 * round(side_px / coarseness / 4))


def _resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _stretch(flow: torch.Tensor, across: float, down: float) -> torch.Tensor:
    return torch.stack([flow[:, 0::2] * across, flow[:, 1::2] * down], 2).flatten(1, 2)
