"""Tensors that another stage sent, as families read them."""

from __future__ import annotations

import torch

from services.errors import InvalidRequest
from services.family import Tensors


def floating(conditions: Tensors, name: str) -> torch.Tensor:
    """A condition of a floating-point type.

    Raises:
        InvalidRequest: it is missing, or of another type.
    """
    if name not in conditions:
        raise InvalidRequest(f"the condition {name!r} is missing: there are {', '.join(sorted(conditions)) or 'none'}")
    tensor = conditions[name]
    if not tensor.is_floating_point():
        raise InvalidRequest(f"the condition {name!r} has dtype {tensor.dtype}: it must be a floating-point type")
    return tensor


def described(tensors: Tensors) -> str:
    """Names, types and shapes, for a refusal."""
    return ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"
