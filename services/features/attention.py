"""The attention kernel, by what the device can do: cuDNN on Hopper and later, PyTorch's own choice elsewhere.

Measured on one H100 at head size 128 and 4.4k tokens: cuDNN 555 TFLOP/s, PyTorch's flash kernel 261.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from services.family import DitModel, DitPart, ModelPlan
from services.features import Applied

NAME = "attention"
EXACT = True
BACKENDS = {"cudnn": "_native_cudnn", "sdpa": "native"}
HOPPER = (9, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`backend` is auto, cudnn or sdpa."""

    backend: str = "auto"


def supports(plan: ModelPlan, device_type: str, active: frozenset[str]) -> str | None:
    """Works with every attention module that takes a backend."""
    return None if plan.attention else "the family names 0 attention modules whose kernel may be chosen"


def apply(model: DitModel, part: DitPart, config: Config) -> Applied:
    """Sets the backend of every transformer.

    Raises:
        ValueError: unknown backend.
    """
    chosen = config.backend
    if chosen == "auto":
        chosen = "cudnn" if _hopper(model.device) else "sdpa"
    if chosen not in BACKENDS:
        raise ValueError(f"features.attention.backend {chosen!r} is unknown: use auto, {', '.join(BACKENDS)}")
    for module in model.modules.values():
        transformer: Any = module
        transformer.set_attention_backend(BACKENDS[chosen])
    return Applied(json.dumps({"backend": chosen}))


def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER
