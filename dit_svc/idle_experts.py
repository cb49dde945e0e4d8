"""Models with several experts on a device that has room for one: the others' weights wait in the host's memory.

Weights never change, so an expert that leaves is not copied back. Its place is free before the next one comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from services.errors import StartupError
from services.family import DitModel

ONE_EXPERT = "engine.offload_experts needs a model of several experts: this one has 1"
WITH_HSDP = "engine.offload_experts does not go with hsdp: each rank holds 1 share of all experts there"
# PyTorch rounds each of its pinned allocations up to a power of two: weights one by one would take half as much again.
PACK_BYTES = 2**30
# Where weights begin in a pack, as copies like it.
ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class Packs:
    """Where weights of these sizes in bytes lie in packs of pinned memory, in their order.

    Attributes:
        sizes: of the packs.
        places: pack and first byte of each weight.
    """

    sizes: tuple[int, ...]
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, weights: Sequence[int]) -> Packs:
        """Packs of PACK_BYTES; a larger weight has one of its own, and the last one is as small as it can be."""
        ends: list[int] = []
        places = []
        for size in weights:
            taken = -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            if not ends or ends[-1] + taken > PACK_BYTES:
                ends.append(0)
            places.append((len(ends) - 1, ends[-1]))
            ends[-1] += taken
        full = [PACK_BYTES if end <= PACK_BYTES else _power_of_two(end) for end in ends[:-1]]
        return cls((*full, *map(_power_of_two, ends[-1:])), tuple(places))


def pinned_bytes(model: DitModel) -> int:
    """What the weights of all experts take of the host."""
    modules = model.modules.values()
    return sum(sum(Packs.of([p.nbytes for p in module.parameters()]).sizes) for module in modules)


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
            if device.type == "cuda":
                _pin(list(module.parameters()))
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


def _pin(weights: Sequence[nn.Parameter], *, pinned: bool = True) -> None:
    """Moves weights into packs, a pack at a time."""
    packs = Packs.of([weight.nbytes for weight in weights])
    for number, size in enumerate(packs.sizes):
        pack = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for weight, (of, first) in zip(weights, packs.places, strict=True):
            if of == number:
                place = pack[first : first + weight.nbytes].view(weight.dtype).view(weight.shape)
                weight.data = place.copy_(weight.data)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
