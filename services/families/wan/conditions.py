"""What other services send to Wan's denoiser, checked: embeddings of each branch, of what is given of a clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from services.conditions import floating
from services.errors import InvalidRequest
from services.families.wan.presets import MAX_REFERENCES
from services.families.wan.text import MAX_TOKENS
from services.family import Tensors


def text_condition(conditions: Tensors, branch: str, width: int) -> torch.Tensor:
    """A branch's embeddings "<branch>/text" as [1, 512, width]: zeros after the prompt's own tokens.

    Raises:
        InvalidRequest: missing, or of another shape or dtype.
    """
    name = f"{branch}/text"
    text = floating(conditions, name)
    if text.ndim != 3 or text.shape[0] != 1 or not 1 <= text.shape[1] <= MAX_TOKENS or text.shape[2] != width:
        raise InvalidRequest(
            f"the condition {name!r} has the shape {list(text.shape)}: it must be [1, T, {width}], T <= {MAX_TOKENS}"
        )
    return nn.functional.pad(text, (0, 0, 0, MAX_TOKENS - text.shape[1]))


def picture_condition(conditions: Tensors, branch: str, width: int, tokens: int) -> torch.Tensor:
    """What the image encoder made of the input pictures, "<branch>/pictures" [1, T, width].

    Args:
        tokens: T that the model wants; 0 for any.

    Raises:
        InvalidRequest: missing, or of another shape or dtype.
    """
    name = f"{branch}/pictures"
    pictures = floating(conditions, name)
    if pictures.ndim != 3 or pictures.shape[0] != 1 or pictures.shape[2] != width or not pictures.shape[1]:
        raise InvalidRequest(f"the condition {name!r} has the shape {list(pictures.shape)}: it must be [1, T, {width}]")
    if tokens and pictures.shape[1] != tokens:
        raise InvalidRequest(f"the condition {name!r} has {pictures.shape[1]} tokens: it must have {tokens}")
    return pictures


def latent_condition(conditions: Tensors, name: str, shape: Sequence[int]) -> torch.Tensor:
    """Latents of what is given of a clip, in that shape.

    Raises:
        InvalidRequest: missing, or of another shape or dtype.
    """
    latents = floating(conditions, name)
    if tuple(latents.shape) != tuple(shape):
        raise InvalidRequest(f"the condition {name!r} has the shape {list(latents.shape)}: it must be {list(shape)}")
    return latents


def control_condition(conditions: Tensors, channels: int, grid: Sequence[int]) -> torch.Tensor:
    """What steers a clip, "control" [1, channels, F', h, w]: F' has a frame for each reference picture beside F.

    Args:
        grid: F, h and w of the clip's latents.

    Raises:
        InvalidRequest: missing, or of another shape or dtype.
    """
    if "control" not in conditions:
        raise InvalidRequest("this model needs an input: a clip (role video) or a reference picture", param="inputs")
    control = floating(conditions, "control")
    frames, *sides = grid
    extra = control.shape[2] - frames if control.ndim == 5 else -1
    if not 0 <= extra <= MAX_REFERENCES or tuple(control.shape) != (1, channels, frames + extra, *sides):
        raise InvalidRequest(
            f"the condition 'control' has the shape {list(control.shape)}: it must be [1, {channels}, F, "
            f"{sides[0]}, {sides[1]}], F between {frames} and {frames + MAX_REFERENCES}"
        )
    return control
