"""What the text service sends to the denoiser: which branches, how long a text, tensors of which shape."""

from __future__ import annotations

from services.conditions import floating
from services.errors import InvalidRequest
from services.family import Tensors
from services.request import ResolvedParams
from services.weights import ModelSource

MAX_TEXT_TOKENS = 512


def text_tokens(source: ModelSource) -> int:
    """T5 tokens of every prompt: 512 for dev, 256 for schnell, as the authors' programs take.

    There is no mask, so the filling behind a prompt is part of what it means.

    Raises:
        StartupError: there is no config of the transformer, which tells the two models apart.
    """
    return MAX_TEXT_TOKENS if source.config("transformer").get("guidance_embeds") else 256


def branches_of(params: ResolvedParams) -> tuple[str, ...]:
    """One branch; with a `guidance_2` above 1 (true classifier-free guidance) the negative prompt's too.

    `guidance` takes no second branch: a distilled model gets it as a number.
    """
    return ("positive", "negative") if params.guidance_2 > 1 else ("positive",)


def text_conditions(conditions: Tensors, branch: str, width: int, pooled_width: int) -> Tensors:
    """A branch's "text" [1, T, width] of T5 and "pooled" [1, pooled_width] of CLIP.

    Raises:
        InvalidRequest: one is missing, or of another shape or dtype.
    """
    text = floating(conditions, f"{branch}/text")
    if text.ndim != 3 or text.shape[0] != 1 or not 1 <= text.shape[1] <= MAX_TEXT_TOKENS or text.shape[2] != width:
        raise InvalidRequest(
            f"the condition '{branch}/text' has the shape {list(text.shape)}: it must be [1, T, {width}], "
            f"T <= {MAX_TEXT_TOKENS}"
        )
    pooled = floating(conditions, f"{branch}/pooled")
    if tuple(pooled.shape) != (1, pooled_width):
        raise InvalidRequest(
            f"the condition '{branch}/pooled' has the shape {list(pooled.shape)}: it must be [1, {pooled_width}]"
        )
    return {"text": text, "pooled": pooled}
