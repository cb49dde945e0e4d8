"""Collectives by reading the peers' memory, for ranks whose GPUs see each other.

A rank shows a tensor in its window, all meet, and everybody reads out of the others' windows what is meant for it.
NCCL's point-to-point kernels do the same exchange at a fraction of the link's rate (docs/performance.md). Two windows
take turns: whoever writes into one again has met all others since they read from it. n ranks.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

# Of the kernel that runs: hosts may share a name.
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
logger = logging.getLogger(__name__)

# Windows grow in steps of this, so that sizes that differ a little share one.
STEP_BYTES = 32 * 2**20


class Window(Protocol):
    """Memory of one size on every rank, which all of them can read."""

    def of(self, rank: int, like: torch.Tensor) -> torch.Tensor:
        """A rank's memory in the shape and dtype of `like`."""

    def meet(self) -> None:
        """What this rank does next comes after all that the others did before."""


class CudaWindow:
    """A window in GPU memory. Making one is a collective of the group.

    Raises:
        RuntimeError: the GPUs do not see each other's memory.
    """

    def __init__(self, size: int, group: str) -> None:
        # Imported where it is used: builds of torch without CUDA may lack it.
        from torch.distributed import _symmetric_memory

        library: Any = _symmetric_memory
        device = torch.device("cuda", torch.cuda.current_device())
        self._memory: torch.Tensor = library.empty(size, dtype=torch.uint8, device=device)
        self._handle = library.rendezvous(self._memory, group)

    def of(self, rank: int, like: torch.Tensor) -> torch.Tensor:
        """See `Window`."""
        view: torch.Tensor = self._handle.get_buffer(rank, like.shape, like.dtype)
        return view

    def meet(self) -> None:
        """See `Window`; the host does not wait."""
        self._handle.barrier()


class PeerMemory:
    """The windows of one rank. All ranks call the same methods in the same order, with tensors of one size.

    Args:
        make: a window of so many bytes, on all ranks at once.
        wait: for all work of this rank's device.
    """

    def __init__(self, make: Callable[[int], Window], rank: int, wait: Callable[[], None]) -> None:
        self._make, self._rank, self._wait = make, rank, wait
        self._windows: list[Window] = []
        self._bytes = 0
        self._turn = 1 - self._turn

    def show(self, tensor: torch.Tensor, ranks: int) -> list[torch.Tensor]:
        """Everybody's tensor, by rank. What comes back may be read until the next `show` but one."""
        window = self._window(tensor.numel() * tensor.element_size())
        window.of(self._rank, tensor).copy_(tensor)
        window.meet()
        return [window.of(rank, tensor) for rank in range(ranks)]

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Piece i of dimension 0 goes to rank i: [n, ...] to [n, ...]."""
        shown = self.show(tensor, tensor.shape[0])
        return torch.stack([pieces[self._rank] for pieces in shown])

    def all_gather(self, tensor: torch.Tensor, ranks: int) -> torch.Tensor:
        """Everybody's tensor: [...] to [n, ...]."""
        return torch.stack(self.show(tensor, ranks))

    def all_reduce(self, tensor: torch.Tensor, ranks: int) -> torch.Tensor:
        """The sum, added in the order of the ranks, so that all have the same bits."""
        return _sum(self.show(tensor, ranks))

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Piece i of dimension 0, summed, for rank i: [n, ...] to [...]."""
        return _sum([pieces[self._rank] for pieces in self.show(tensor, tensor.shape[0])])

    def _window(self, size: int) -> Window:
        if size > self._bytes:
            # Nobody may still read from windows that go.
            if self._windows:
                self._windows[self._turn].meet()
            self._wait()
            self._bytes = -(-size // STEP_BYTES) * STEP_BYTES
            self._windows = []
            self._windows = [self._make(self._bytes) for _ in range(2)]
        self._turn = 1 - self._turn
        return self._windows[self._turn]


def connect(group: dist.ProcessGroup) -> PeerMemory | None:
    """Peer memory for the GPUs of a group, which all its ranks ask for at once.

    Returns:
        None where ranks are on several hosts, or a GPU does not see another's memory.
    """
    hosts = [("", "")] * group.size()
    dist.all_gather_object(hosts, (socket.gethostname(), BOOT_ID.read_text()), group=group)
    if len(set(hosts)) > 1:
        return None
    make = partial(CudaWindow, group=group.group_name)
    sees = torch.ones(1)
    try:
        make(STEP_BYTES)
    except RuntimeError as error:
        logger.warning("the GPUs do not read each other's memory, NCCL carries everything: %s", error)
        sees.zero_()
    dist.all_reduce(sees, op=dist.ReduceOp.MIN, group=group)
    return PeerMemory(make, group.rank(), torch.cuda.synchronize) if sees.item() else None


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total
