"""A request between two steps as named tensors and attributes, and back.

A checkpoint belongs to a model, a dtype and a schedule, not to a replica: any replica of the component resumes it, and
in the same layout the result is the same bit for bit. What the request's parameters determine is not stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from services.errors import InvalidRequest
from services.family import DenoiseState, DitModel
from services.scheduler_state import restore_scheduler, save_scheduler

FORMAT = "1"


def save_state(state: DenoiseState) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Latents, scheduler state and caches."""
    tensors = {"latents": state.latents}
    scheduler_tensors, values = save_scheduler(state.scheduler)
    tensors |= {f"scheduler/{name}": tensor for name, tensor in scheduler_tensors.items()}
    for (feature, branch), cache in state.caches.items():
        tensors |= {f"cache/{feature}/{branch}/{name}": tensor for name, tensor in cache.items()}
    attributes = {"format": FORMAT, "step": str(state.step), "scheduler": json.dumps(values)}
    return tensors, attributes


def restore_state(
    model: DitModel, state: DenoiseState, tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, str]
) -> None:
    """Brings a fresh state (step 0) to where the checkpoint was taken.

    Raises:
        InvalidRequest: it is of another format, shape or schedule.
    """
    try:
        step, values = int(attributes["step"]), json.loads(attributes["scheduler"])
        latents = tensors["latents"]
    except (KeyError, ValueError) as error:
        raise InvalidRequest(f"the checkpoint is not one of ours: {error}") from error
    if attributes.get("format") != FORMAT or not 0 <= step <= state.num_steps:
        raise InvalidRequest(f"the checkpoint has format {attributes.get('format')} and step {step}: cannot resume it")
    if latents.shape != state.latents.shape or latents.dtype != state.latents.dtype:
        raise InvalidRequest(
            f"the checkpoint's latents are {latents.dtype} {list(latents.shape)}, the request's are "
            f"{state.latents.dtype} {list(state.latents.shape)}"
        )
    state.latents = latents.to(model.device)
    state.step = step
    prefix = "scheduler/"
    kept = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    restore_scheduler(state.scheduler, kept, values, model.device)
    for name, tensor in tensors.items():
        if name.startswith("cache/"):
            _, feature, branch, field = name.split("/", 3)
            state.caches.setdefault((feature, branch), {})[field] = tensor.to(model.device)
