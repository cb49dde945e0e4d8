"""A diffusers scheduler's mutable state as tensors and scalars, and back onto a fresh scheduler of the same config.

What set_timesteps computes is computed again; only what stepping changed is kept: counters and the history of
multistep methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# Attributes that `step` changes, over all schedulers in use.
COUNTERS = ("_step_index", "_begin_index", "lower_order_nums", "this_order")
HISTORY = ("model_outputs", "timestep_list")
TENSORS = ("last_sample",)


def save_scheduler(scheduler: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What stepping has changed: (tensors, plain values)."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name in COUNTERS:
        if getattr(scheduler, name, None) is not None:
            values[name] = int(getattr(scheduler, name))
    for name in TENSORS:
        value = getattr(scheduler, name, None)
        if isinstance(value, torch.Tensor):
            tensors[name] = value
    for name in HISTORY:
        history = getattr(scheduler, name, None)
        if history is None:
            continue
        values[name] = len(history)
        tensors |= {f"{name}.{index}": torch.as_tensor(item) for index, item in enumerate(history) if item is not None}
    return tensors, values


def restore_scheduler(
    scheduler: Any, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any], device: torch.device
) -> None:
    """Puts the state onto a scheduler whose timesteps are set."""
    for name in COUNTERS:
        if name in values:
            setattr(scheduler, name, values[name])
    for name in TENSORS:
        if name in tensors:
            setattr(scheduler, name, tensors[name].to(device))
    for name in HISTORY:
        if name in values:
            items = [tensors.get(f"{name}.{index}") for index in range(values[name])]
            setattr(scheduler, name, [None if item is None else item.to(device) for item in items])
