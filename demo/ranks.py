"""Training on several GPUs of one machine: each process draws batches of its own, and gradients are averaged.

`torchrun --standalone --nproc-per-node N -m PROGRAM` starts the processes. Their weights stay equal, bit for bit: all
start from one seed or file and take the same steps. What is decided by the clock goes by the first one's, at the same
steps: a process that ended a step earlier would leave the others waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that train together, as one of them sees them. The one of rank 0 prints and saves."""

    rank: int = 0
    size: int = 1

    @property
    def device(self) -> torch.device:
        """This process's GPU, or the CPU."""
        return torch.device("cuda", self.rank) if torch.cuda.is_available() else torch.device("cpu")

    def seed(self, seed: int) -> int:
        """Another one on each rank, and for each given seed; for a process alone the given one."""
        return seed * self.size + self.rank

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Puts the mean over all ranks into tensors of one dtype, by one all-reduce."""
        if self.size > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            parts = (flat / self.size).split([tensor.numel() for tensor in tensors])
            # Into the tensors as they lie: fused optimisers take gradients in their weights' layout only.
            shaped = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
            torch._foreach_copy_(list(tensors), shaped)

    def first(self, value: float) -> float:
        """The value that rank 0 has; all ranks must ask."""
        told = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.broadcast(told, 0)
        return told.item()

    def meet(self) -> None:
        """Goes on when all ranks are here."""
        self.first(0.0)


ALONE = Ranks()


def join() -> Ranks:
    """The ranks that torchrun started; without it, this process alone."""
    if not dist.is_torchelastic_launched():
        return ALONE
    device = Ranks(dist.get_node_local_rank()).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Ends the group, so that rank 0 can go on alone while the others end."""
    if dist.is_initialized():
        dist.destroy_process_group()
