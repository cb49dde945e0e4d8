"""Models with several experts on a device that has room for one: the others' weights wait in the host's memory.

Weights never change, so an expert that leaves is not copied back. Its place is free before the next one comes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from services.errors import StartupError
from services.family import DitModel

ONE_EXPERT = "engine.offload_experts needs a model of several experts: this one has 1"
WITH_HSDP = "engine.offload_experts does not go with hsdp: each rank holds 1 share of all experts there"


def pinned_bytes(parameter: torch.Tensor) -> int:
    """What a weight takes of the host: torch rounds each of its pinned allocations up to a power of two."""
    return 1 << (parameter.nbytes - 1).bit_length()


class IdleExperts:
    """Puts the weights of the expert that is wanted on the device. One thread calls everything.

    Args:
        model: loaded on the CPU. Its buffers go to the device for good: they are small.
        device: where it computes. On a CUDA device, the host's copies are pinned, so that they travel at full speed.

    Raises:
        StartupError: there is one expert only.
    """

    def __init__(self, model: DitModel, device: torch.device) -> None:
        if len(model.modules) < 2:
            raise StartupError(ONE_EXPERT)
        self.swaps = 0
        self._modules: Mapping[str, nn.Module] = model.modules
        self._device = device
        self._present: str | None = None
        self._host: dict[str, dict[str, torch.Tensor]] = {}
        for name, module in model.modules.items():
            for buffer in module.buffers():
                buffer.data = buffer.data.to(device)
            for parameter in module.parameters():
                if device.type == "cuda":
                    parameter.data = parameter.data.pin_memory()
            self._host[name] = {key: parameter.data for key, parameter in module.named_parameters()}

    def enter(self, name: str) -> nn.Module:
        """The expert's module, with its weights on the device.

        Raises:
            torch.OutOfMemoryError: they do not fit; the next call begins anew.
        """
        module = self._modules[name]
        if name == self._present:
            return module
        self._present = None
        for other, waiting in self._modules.items():
            for key, parameter in waiting.named_parameters():
                parameter.data = self._host[other][key]
        for key, parameter in module.named_parameters():
            # A copy on any device: what leaves is never what the host keeps.
            parameter.data = self._host[name][key].to(self._device, non_blocking=True, copy=True)
        self._present = name
        self.swaps += 1
        return module
