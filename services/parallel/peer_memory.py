"""Collectives by reading the peers' memory, for ranks whose GPUs see each other.

A rank shows a tensor in its window, all meet, and everybody reads out of the others' windows what is meant for it.
NCCL's point-to-point kernels do the same exchange at a fraction of the link's rate (docs/performance.md). Two windows
take turns: whoever writes into one again has met all others since they read from it. n ranks.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from services.parallel.edges import PeerEdges

# Of the kernel that runs: hosts may share a name.
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
logger = logging.getLogger(__name__)
T = TypeVar("T")

# What the driver says where memory cannot be given to another process or GPU. All else is a fault.
UNSHARED = ("not supported", "not permitted")
# Windows grow in steps of this, so that sizes that differ a little share one.
STEP_BYTES = 32 * 2**20


class Window(Protocol):
    """Memory of one size on every rank, which all of them can read."""

    def of(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A rank's memory from its start on."""

    def meet(self) -> None:
        """What this rank does next comes after all that the others did before."""


class CudaWindow:
    """A window in GPU memory. Making one is a collective of the group.

    Raises:
        torch.OutOfMemoryError: on all ranks, where one of them has no room for it.
        RuntimeError: a driver refuses; on all ranks, where it does so before they meet.
    """

    def __init__(self, size: int, group: dist.ProcessGroup) -> None:
        # Imported where it is used: builds of torch without CUDA may lack it.
        from torch.distributed import _symmetric_memory

        library: Any = _symmetric_memory
        device = torch.device("cuda", torch.cuda.current_device())
        # Windows are not PyTorch's memory: what it keeps for later must be free for them.
        torch.cuda.empty_cache()
        refusal = ""
        try:
            self._memory: torch.Tensor = library.empty(size, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            refusal = str(error)
        # A rank that has none would not come to where the others wait for it.
        if refusals := [f"rank {rank}: {said}" for rank, said in enumerate(_gather(refusal, group)) if said]:
            cls = torch.OutOfMemoryError if "out of memory" in refusals[0] else RuntimeError
            raise cls(f"no window of {size} bytes on {refusals[0]}")
        self._handle = library.rendezvous(self._memory, group.group_name)

    def of(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Window`."""
        view: torch.Tensor = self._handle.get_buffer(rank, shape, dtype)
        return view

    def meet(self) -> None:
        """See `Window`; the host does not wait."""
        self._handle.barrier()


class PeerMemory:
    """The windows of one rank. All ranks call the same methods in the same order, with tensors of one size.

    Args:
        make: a window of so many bytes, on all ranks at once.
        device: this rank's; on the CPU, which has no streams, copies aside are made at once.

    Attributes:
        rank: this one's place in the group.
    """

    def __init__(self, make: Callable[[int], Window], rank: int, device: torch.device) -> None:
        self._make, self.rank = make, rank
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._shown: list[Window] = []
        self._shown_bytes = 0
        self._turn = 0
        self._windows: dict[str, Window] = {}
        self._window_bytes: dict[str, int] = {}
        # Of a CUDA graph that is being made, what it reads, and whether something has been shown in it.
        self._held: tuple[list[Window], list[torch.Tensor]] | None = None
        self._shown_in_graph = False

    def show(self, tensor: torch.Tensor, ranks: int) -> list[torch.Tensor]:
        """Everybody's tensor, by rank. What comes back may be read until the next `show` but one."""
        window = self._next_shown(tensor.numel() * tensor.element_size())
        self._hold_window(window)
        if self._held and not self._shown_in_graph:
            window.meet()
            self._shown_in_graph = True
        window.of(self.rank, tensor.shape, tensor.dtype).copy_(tensor)
        window.meet()
        return [window.of(rank, tensor.shape, tensor.dtype) for rank in range(ranks)]

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Piece i of dimension 0 goes to rank i: [n, ...] to [n, ...]."""
        shown = self.show(tensor, tensor.shape[0])
        return torch.stack([pieces[self.rank] for pieces in shown])

    def all_gather(self, tensor: torch.Tensor, ranks: int) -> torch.Tensor:
        """Everybody's tensor: [...] to [n, ...]."""
        return torch.stack(self.show(tensor, ranks))

    def all_reduce(self, tensor: torch.Tensor, ranks: int) -> torch.Tensor:
        """The sum, added in the order of the ranks, so that all have the same bits."""
        return _sum(self.show(tensor, ranks))

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Piece i of dimension 0, summed, for rank i: [n, ...] to [...]."""
        return _sum([pieces[self.rank] for pieces in self.show(tensor, tensor.shape[0])])

    def window(self, use: str, size: int) -> Window:
        """One window of at least so many bytes for each use, for callers that know when it is free.

        It is the same at every call until a larger one is needed.
        """
        if use not in self._windows or size > self._window_bytes[use]:
            self._leave(self._windows.get(use))
            self._windows.pop(use, None)
            self._window_bytes[use] = rounded(size)
            self._windows[use] = self._make(self._window_bytes[use])
        window = self._windows[use]
        self._hold_window(window)
        return window

    @contextmanager
    def recorded(self, windows: list[Window], tensors: list[torch.Tensor]) -> Iterator[None]:
        """What is launched inside becomes a CUDA graph; what it reads beside its own memory is added to the lists.

        A graph always begins with the same window, whichever was the last before it, and nobody knows at its end
        which was its last: where something is shown, all meet once more before its first and behind its last.
        """
        turn = self._turn
        self._held, self._shown_in_graph = (windows, tensors), False
        try:
            yield
            if self._shown_in_graph:
                self._shown[self._turn].meet()
        finally:
            self._held, self._turn = None, turn

    def hold(self, tensor: torch.Tensor) -> None:
        """A graph that is being made reads this tensor, which is not in its own memory."""
        if self._held:
            self._held[1].append(tensor)

    def keep(self, size: int) -> Window:
        """A window of so many bytes that is the caller's."""
        return self._make(size)

    def aside(self) -> AbstractContextManager[Any]:
        """Work that goes on beside what follows; it begins after what came before."""
        if self._aside is None:
            return nullcontext()
        self._aside.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._aside)

    def mark(self) -> torch.Event | None:
        """The present end of all work aside, for `wait`."""
        return None if self._aside is None else self._aside.record_event()

    def wait(self, mark: torch.Event | None) -> None:
        """What follows comes after that work; the host does not wait."""
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)

    @cached_property
    def edges(self) -> PeerEdges:
        """Inboxes for edges of pictures' pieces, on GPUs."""
        from services.parallel.edges import PeerEdges  # It is built on this.

        return PeerEdges(self)

    def _hold_window(self, window: Window) -> None:
        if self._held and window not in self._held[0]:
            self._held[0].append(window)

    def _next_shown(self, size: int) -> Window:
        if size > self._shown_bytes:
            self._leave(self._shown[self._turn] if self._shown else None)
            # Until both are made there are none: one that does not fit may be smaller the next time.
            self._shown, self._shown_bytes = [], 0
            self._shown = [self._make(rounded(size)) for _ in range(2)]
            self._shown_bytes = rounded(size)
        self._turn = 1 - self._turn
        return self._shown[self._turn]

    def _leave(self, window: Window | None) -> None:
        """Until nobody uses a window that goes."""
        if window is not None:
            window.meet()
        if self._aside is not None:
            torch.cuda.synchronize()


def connect(group: dist.ProcessGroup) -> PeerMemory | None:
    """Peer memory for the GPUs of a group, which all its ranks ask for at once, and all get or none does.

    Returns:
        None where ranks are on several hosts, or a GPU does not read another's memory.

    Raises:
        torch.OutOfMemoryError: on all ranks, where one has no room for a window.
        RuntimeError: any other fault of a GPU.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    places = _gather((socket.gethostname(), BOOT_ID.read_text(), _id_of(device.index)), group)
    if len({(host, boot) for host, boot, _ in places}) > 1:
        return None
    others = [gpu for rank, (_, _, gpu) in enumerate(places) if rank != group.rank()]
    if not all(_gather(_reads(device.index, others), group)):
        logger.warning("the GPUs do not read each other's memory, NCCL carries everything")
        return None
    make = partial(CudaWindow, group=group)
    refusal = ""
    try:
        make(STEP_BYTES)
    except RuntimeError as error:
        if not any(words in str(error) for words in UNSHARED):
            raise
        refusal = str(error)
    if refusals := [said for said in _gather(refusal, group) if said]:
        logger.warning("the GPUs may not share their memory, NCCL carries everything: %s", refusals[0])
        return None
    return PeerMemory(make, group.rank(), device)


def _gather(mine: T, group: dist.ProcessGroup) -> list[T]:
    """Everybody's, by rank."""
    everybodys = [mine] * group.size()
    dist.all_gather_object(everybodys, mine, group=group)
    return everybodys


def _id_of(index: int) -> str:
    """A GPU's own, whatever its index is in a process."""
    return str(torch.cuda.get_device_properties(index).uuid)


def _reads(index: int, others: Sequence[str]) -> bool:
    """Whether a GPU can read the memory of all the others. Those that this process does not see it cannot."""
    seen = {_id_of(peer): peer for peer in range(torch.cuda.device_count())}
    return all(other in seen and torch.cuda.can_device_access_peer(index, seen[other]) for other in others)


def rounded(size: int) -> int:
    """Bytes of a window that is to hold so many, as `PeerMemory` makes them."""
    return -(-size // STEP_BYTES) * STEP_BYTES


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total
