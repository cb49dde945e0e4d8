"""What other services send to the denoiser, checked: embeddings of branches, latents of input pictures, a mask."""

from __future__ import annotations

import torch

from services.conditions import floating
from services.errors import InvalidRequest
from services.families.qwen_image.cut import Grid
from services.families.qwen_image.latents import PATCH, pack
from services.family import Tensors


def text_condition(conditions: Tensors, branch: str, width: int) -> torch.Tensor:
    """A branch's embeddings "<branch>/text" [1, T, width].

    Raises:
        InvalidRequest: missing, or of another shape or dtype.
    """
    name = f"{branch}/text"
    text = floating(conditions, name)
    if text.ndim != 3 or text.shape[0] != 1 or text.shape[1] < 1 or text.shape[2] != width:
        raise InvalidRequest(f"the condition {name!r} has the shape {list(text.shape)}: it must be [1, T, {width}]")
    return text


def picture_conditions(conditions: Tensors, channels: int) -> Tensors:
    """The latents "image/N" [1, C, h, w] as one packed sequence, and their grids.

    Returns:
        "pictures" [1, S, 4 C] and, on the CPU, "picture_grids" [N, 3]: frames, rows and columns of patches.

    Raises:
        InvalidRequest: there is none, or one has another shape or dtype.
    """
    names = [f"image/{index}" for index in range(sum(name.startswith("image/") for name in conditions))] or ["image/0"]
    packed, grids = [], []
    for name in names:
        latents = floating(conditions, name)
        if (
            latents.ndim != 4
            or latents.shape[:2] != (1, channels)
            or any(n < 1 or n % PATCH for n in latents.shape[2:])
        ):
            raise InvalidRequest(
                f"the condition {name!r} has the shape {list(latents.shape)}: it must be [1, {channels}, h, w] "
                "with even sides"
            )
        packed.append(pack(latents))
        grids.append([1, latents.shape[2] // PATCH, latents.shape[3] // PATCH])
    return {"pictures": torch.cat(packed, dim=1), "picture_grids": torch.tensor(grids)}


def mask_conditions(conditions: Tensors, channels: int, grid: Grid) -> Tensors:
    """What a mask keeps: the picture's latents "kept" [1, C, h, w] and the "mask" [1, 1, h, w], 1 where it is edited.

    Args:
        grid: of the picture that is made: frames, rows and columns of patches.

    Returns:
        "kept" and "anew", both packed [1, S, 4 C]; nothing where there is no mask.

    Raises:
        InvalidRequest: one is missing, or has another shape or dtype.
    """
    if "mask" not in conditions:
        return {}
    height, width = grid[1] * PATCH, grid[2] * PATCH
    masked = []
    for name, depth in (("kept", channels), ("mask", 1)):
        tensor = floating(conditions, name)
        if tuple(tensor.shape) != (1, depth, height, width):
            raise InvalidRequest(
                f"the condition {name!r} has the shape {list(tensor.shape)}: it must be {[1, depth, height, width]}"
            )
        masked.append(pack(tensor.expand(-1, channels, -1, -1)))
    return {"kept": masked[0], "anew": masked[1]}
