"""A clip on its way through the interpolator: chunks of frames in, chunks of more frames out.

Of what came in, only the last frame stays. Every picture is encoded once, all moments between two pictures are asked
for directly, and pairs share batches.

Letters of shapes: N frames, H W their pixels, C planes, B pictures of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from interpolation_svc.between import pictures_between
from interpolation_svc.cuts import cuts, thumbnails
from interpolation_svc.ifnet import MULTIPLE_PX, IFNet
from services.errors import NonFinite


@dataclass(frozen=True, slots=True)
class Known:
    """Frames with what the network and the cut detector need of them.

    Shapes: pixels [N, H, W, 3], uint8, on the CPU; planes [N, C, H', W'], padded; thumbs [N, 1, 32, 32].
    """

    pixels: torch.Tensor
    planes: torch.Tensor
    thumbs: torch.Tensor

    def followed_by(self, later: Known) -> Known:
        """Both, one after the other."""
        return Known(
            torch.cat([self.pixels, later.pixels]),
            torch.cat([self.planes, later.planes]),
            torch.cat([self.thumbs, later.thumbs]),
        )

    def last(self) -> Known:
        """The last frame, in memory of its own."""
        return Known(self.pixels[-1:].clone(), self.planes[-1:].clone(), self.thumbs[-1:].clone())


class Clip:
    """F frames become (F - 1) * 2^exponent + 1; those that came in are among them, unchanged.

    Across a cut no picture is made: the nearer of both sides stands longer, the earlier one in the middle.

    Args:
        exponent: at least 1; there is no upper bound here.
        scale: of the resolution at which flow is estimated, 0.25 to 4; below 1 for large pictures.
        max_batch: pictures that are made, or encoded, at once.
    """

    def __init__(self, net: IFNet, exponent: int, scale: float, max_batch: int) -> None:
        self._net = net
        self._steps = 2**exponent
        self._scale = scale
        self._max_batch = max_batch
        self._last: Known | None = None

    def add(self, frames: torch.Tensor) -> Iterator[torch.Tensor]:
        """The next frames, uint8 [N, H, W, 3] on the CPU, of one size; gives what is known with them.

        Returns:
            chunks [n, H, W, 3], uint8 on the CPU, of at most `max_batch` frames.

        Raises:
            NonFinite: the network's numbers overflowed.
        """
        for some in frames.split(self._max_batch):
            known = self._encode(some)
            # Moments in steps between frames; that of the frame that was last has been given.
            start = 0 if self._last is None else 1
            if self._last is not None:
                known = self._last.followed_by(known)
            self._last = known.last()
            # Nothing is known of what follows the last frame, and no moment after it is asked for.
            is_cut = F.pad(cuts(known.thumbs[:-1], known.thumbs[1:]).cpu(), (0, 1))
            for moments in torch.arange(start, (len(known.pixels) - 1) * self._steps + 1).split(self._max_batch):
                yield self._at(known, is_cut, moments)

    def _encode(self, pixels: torch.Tensor) -> Known:
        like = next(self._net.parameters())
        pictures = pixels.to(like.device).permute(0, 3, 1, 2).float() / 255
        height, width = pixels.shape[1:3]
        padded = F.pad(pictures, (0, -width % MULTIPLE_PX, 0, -height % MULTIPLE_PX), mode="replicate")
        return Known(pixels, self._net.encode_pictures(padded), thumbnails(pictures))

    def _at(self, known: Known, is_cut: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
        """Pictures of these moments, in their order."""
        before, steps = moments // self._steps, moments % self._steps
        across = is_cut[before]
        frames = known.pixels[before + (across & (2 * steps > self._steps)).long()]
        between = ((steps > 0) & ~across).nonzero().flatten()
        if len(between):
            frames[between] = self._made(known, before[between], steps[between])
        return frames

    def _made(self, known: Known, before: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        device = known.planes.device
        first, second = known.planes[before.to(device)], known.planes[before.to(device) + 1]
        time = (steps.float() / self._steps).to(device)
        height, width = known.pixels.shape[1:3]
        pictures = pictures_between(self._net, first, second, time, self._scale)[:, :, :height, :width]
        if not torch.isfinite(pictures).all():
            raise NonFinite("the interpolated pictures have values that are not finite")
        return (pictures * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
