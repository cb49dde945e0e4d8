"""What steers VACE's clips: a clip, a mask of what is to be made anew in it, and reference pictures, as latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from services.errors import InvalidRequest
from services.family import Frames, Inputs
from services.request import ResolvedParams


def clip_and_mask(inputs: Inputs, params: ResolvedParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The clip [1, 3, F, H, W] in [-1, 1], grey where there is none, and the mask in [0, 1], 1 where there is none.

    Frames are stretched to the size that is made. A mask comes with a clip; it may be one picture, for all frames.

    Raises:
        InvalidRequest: a mask has transparency, or there are too few frames.
    """
    shape = (1, 3, params.num_frames, params.height, params.width)
    if "video" not in inputs:
        return torch.zeros(shape), torch.ones(shape)
    clip = pixels_of(_enough(inputs["video"][0], "clip", params), params)
    if "mask" not in inputs:
        return clip, torch.ones(shape)
    mask = _opaque(inputs["mask"][0])
    if len(mask) == 1:
        return clip, ((pixels_of(mask, params) + 1) / 2).clamp(0, 1).expand(shape)
    return clip, ((pixels_of(_enough(mask, "mask", params), params) + 1) / 2).clamp(0, 1)


def _opaque(mask: Frames) -> Frames:
    # Of a picture's mask, transparency is what counts, and colours do not. A picture painted white where it is not
    # transparent would mean one thing by one rule and the opposite by the other.
    if (mask[..., 3:] != 255).any():
        raise InvalidRequest(
            "the mask has transparent pixels: here white is made anew and black stays, so send it without transparency",
            param="inputs",
        )
    return mask[..., :3]


def _enough(frames: Frames, name: str, params: ResolvedParams) -> Frames:
    if len(frames) < params.num_frames:
        raise InvalidRequest(
            f"the input {name} has {len(frames)} frames: num_frames is {params.num_frames}, so it must have as many",
            param="inputs",
        )
    return frames[: params.num_frames]


def pixels_of(frames: Frames, params: ResolvedParams) -> torch.Tensor:
    """Frames stretched to the clip's size, as the stock pipelines do: [1, 3, F, H, W] in [-1, 1], fp32."""
    return resized(frames, params.width, params.height).transpose(0, 1)[None]


def resized(frames: Frames, width: int, height: int) -> torch.Tensor:
    """Frames [F, H, W, 3] at another size: [F, 3, H, W] in [-1, 1], fp32."""
    size = (width, height)
    scaled = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames]
    # Divided and shifted in this order, as the library's image processor does: the last bits depend on it. In place, as
    # a reference picture of a few hundred kilobytes may have 64 million pixels.
    pixels = np.stack(scaled).astype(np.float32)
    pixels /= 255.0
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).mul_(2.0).sub_(1.0)


def reference_pixels(picture: Frames, params: ResolvedParams, unit: int) -> torch.Tensor:
    """A reference picture, whole, on a white ground of the clip's size: [1, 3, 1, H, W].

    Args:
        unit: its sides are cut to multiples of it first.

    Raises:
        InvalidRequest: it is too small, or so long that nothing would be left of its other side.
    """
    height, width = (side // unit * unit for side in picture.shape[1:3])
    scale = min(params.height / height, params.width / width) if height and width else 0.0
    inner = (int(height * scale), int(width * scale))
    if not all(inner):
        raise InvalidRequest(
            f"a reference picture has {picture.shape[2]}x{picture.shape[1]} pixels: its sides need {unit} at least, "
            "and must not differ that much",
            param="inputs",
        )
    pixels = F.interpolate(resized(picture, width, height), size=inner, mode="bilinear", align_corners=False)
    top, left = (params.height - inner[0]) // 2, (params.width - inner[1]) // 2
    ground = torch.ones(1, 3, 1, params.height, params.width)
    ground[:, :, 0, top : top + inner[0], left : left + inner[1]] = pixels
    return ground


def mask_channels(mask: torch.Tensor, side: int, frames_each: int, references: int) -> torch.Tensor:
    """A mask [1, 3, F, H, W] as channels of latents, one for each pixel of `side` x `side`: [1, side^2, F', h, w].

    Args:
        references: frames before the clip's own, of which nothing is made anew.
    """
    _, _, frames, height, width = mask.shape
    rows, columns = height // side, width // side
    spread = mask[0, 0].view(frames, rows, side, columns, side).permute(2, 4, 0, 1, 3).flatten(0, 1)
    size = (math.ceil(frames / frames_each), rows, columns)
    channels = F.interpolate(spread[None], size=size, mode="nearest-exact")
    return F.pad(channels, (0, 0, 0, 0, references, 0))


def references_before(clip: torch.Tensor, references: Sequence[torch.Tensor]) -> torch.Tensor:
    """Latents of a clip [1, 2 C, F', h, w] behind those of reference pictures [1, C, 1, h, w], the last one first."""
    for reference in references:
        clip = torch.cat([torch.cat([reference, torch.zeros_like(reference)], dim=1), clip], dim=2)
    return clip
