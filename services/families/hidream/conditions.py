"""What the text service and the denoiser agree on, and the check of what the one sends to the other.

Every layer of Llama that the transformer's blocks see travels as a tensor of its own, under its number: the text
service reads the numbers from the transformer's config, and neither side has to guess which layers the other means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from services.errors import InvalidRequest
from services.family import Tensors

# There is no text mask in the model, so the length of all text, filling included, is part of what it means.
TEXT_TOKENS = 128


def llama_layers(config: Mapping[str, Any]) -> list[int]:
    """The layers of Llama that a transformer's blocks see, from its config, each once and in ascending order."""
    return sorted(set(config["llama_layers"]))


def text_conditions(conditions: Tensors, branch: str, config: Any) -> Tensors:
    """A branch's text, as the batch takes it.

    Args:
        conditions: "<branch>/t5" [1, 128, width], "<branch>/pooled" [1, width], and "<branch>/llama/K" [1, 128, width]
            for each layer K that the transformer uses.
        config: the transformer's.

    Returns:
        "t5", "pooled" and, of all layers in ascending order, "llama" [1, 128, L, width].

    Raises:
        InvalidRequest: one is missing, or of another shape or dtype.
    """
    t5, llama = ((1, TEXT_TOKENS, width) for width in config.caption_channels)
    layers = [_checked(conditions, f"{branch}/llama/{layer}", llama) for layer in llama_layers(config)]
    return {
        "t5": _checked(conditions, f"{branch}/t5", t5),
        "pooled": _checked(conditions, f"{branch}/pooled", (1, config.text_emb_dim)),
        "llama": torch.stack(layers, dim=2),
    }


def _checked(conditions: Tensors, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name not in conditions:
        raise InvalidRequest(f"the condition {name!r} is missing: there are {', '.join(sorted(conditions)) or 'none'}")
    tensor = conditions[name]
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise InvalidRequest(
            f"the condition {name!r} is {tensor.dtype} {list(tensor.shape)}: it must be of a floating-point type and "
            f"{list(shape)}"
        )
    return tensor
