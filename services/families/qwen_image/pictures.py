"""Input pictures at the sizes that the encoders work on."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from services.errors import InvalidRequest
from services.family import Frames

SIDE_MULTIPLE_PX = 32
MAX_ASPECT = 200.0


def scaled(picture: Frames, area_px: int) -> Image.Image:
    """The picture [1, H, W, 3 or 4] scaled to about `area_px`, its sides multiples of 32 px.

    Raises:
        InvalidRequest: one side is so much longer than the other that nothing would be left of it.
    """
    height, width = picture.shape[1:3]
    exact_width = math.sqrt(area_px * (width / height))
    sides = [
        round(side / SIDE_MULTIPLE_PX) * SIDE_MULTIPLE_PX for side in (exact_width, exact_width / (width / height))
    ]
    if min(sides) == 0 or max(width / height, height / width) > MAX_ASPECT:
        raise InvalidRequest(
            f"an input picture has {width}x{height} pixels: one side is too long for the other", param="inputs"
        )
    return resized(picture, (sides[0], sides[1]))


def resized(picture: Frames, size: tuple[int, int]) -> Image.Image:
    """The picture [1, H, W, 3 or 4] at a size (width, height), whatever its shape."""
    return Image.fromarray(picture[0]).resize(size, Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """[1, 3 or 4, H, W] float32 in [-1, 1]."""
    # Divided and shifted in this order, as the library's image processor does: the last bits depend on it.
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255.0)
    return 2.0 * pixels.permute(2, 0, 1)[None] - 1.0


def edited_area(mask: Frames, picture: Frames, size: tuple[int, int], compression: int) -> torch.Tensor:
    """Where a mask [1, H, W, 4] is transparent, for each latent of a picture of `size`: [1, 1, h, w], 1 for yes.

    Raises:
        InvalidRequest: the mask has another size than the picture, or is nowhere transparent.
    """
    if mask.shape[:3] != picture.shape[:3]:
        raise InvalidRequest("the mask has another size than the first picture", param="inputs")
    # Scaled, cut at a half and sampled in this order, as the stock pipeline for masks does.
    transparent = resized(255 - mask[..., 3], size)
    pixels = torch.from_numpy((np.asarray(transparent).astype(np.float32) / 255.0 >= 0.5).astype(np.float32))
    area = F.interpolate(pixels[None, None], size=(size[1] // compression, size[0] // compression))
    if not area.any():
        raise InvalidRequest(
            f"the mask has no transparent area of {compression}x{compression} pixels or more: where it is transparent, "
            "the picture is edited",
            param="inputs",
        )
    return area
