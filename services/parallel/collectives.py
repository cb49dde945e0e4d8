"""Collectives as operators that a compiled graph carries without a break, with a count of the bytes that a rank sends.

A group is named by its process group's name, since operators take plain values only. On an axis of one rank nothing
is called. Ranks whose GPUs see each other read each other's memory (`peer_memory.py`); all others use the process
group. Bytes are what the algorithm of the fewest bytes sends from one rank. On the meta device nothing is sent, but
counted all the same: that is how a dry run (`dit_svc/dry_run.py`) knows what a layout costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from services.parallel.edges import channels_last
from services.parallel.peer_memory import PeerMemory, Window, rounded
from services.vae_kernels import has_compiler

# How many ranks at most sum by reading every peer's whole tensor: with more, rings send less.
READ_TO_SUM_UP_TO = 2
# The groups that have it, by name: operators take plain values only.
peer_memory: dict[str, PeerMemory] = {}

# What this rank has sent, by kind of collective: bytes, and calls. Figures for metrics, tests and dry runs.
sent_bytes: Counter[str] = Counter()
sent_calls: Counter[str] = Counter()
# Of a dry run, the windows that its groups would have where GPUs see each other's memory, by group and use: bytes.
window_bytes: dict[tuple[str, str], int] = {}


@dataclass(frozen=True, slots=True)
class Held:
    """What a CUDA graph needs of collectives, and what it sends.

    Attributes:
        windows, tensors: that it reads, and that stay as long as it does.
        sent_bytes, sent_calls: of one run, by kind.
    """

    windows: list[Window] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    sent_bytes: Counter[str] = field(default_factory=Counter)
    sent_calls: Counter[str] = field(default_factory=Counter)

    def count(self) -> None:
        """Notes that the graph has run."""
        sent_bytes.update(self.sent_bytes)
        sent_calls.update(self.sent_calls)

    def let_go(self) -> None:
        """Before the graph goes, on all ranks at once: until no peer reads this rank's windows for it."""
        for window in self.windows:
            window.meet()
        if self.windows and torch.cuda.is_available():
            torch.cuda.synchronize()


@contextmanager
def held_by_graph() -> Iterator[Held]:
    """What collectives launch inside becomes part of a CUDA graph, which may run at any time from then on."""
    held, bytes_before, calls_before = Held(), Counter(sent_bytes), Counter(sent_calls)
    with ExitStack() as stack:
        for peers in peer_memory.values():
            stack.enter_context(peers.recorded(held.windows, held.tensors))
        yield held
    # Nothing has been sent yet.
    for counted, before, ours in (
        (sent_bytes, bytes_before, held.sent_bytes),
        (sent_calls, calls_before, held.sent_calls),
    ):
        ours.update(counted - before)
        counted.subtract(ours)


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    registry: Any = torch._C._distributed_c10d
    group: dist.ProcessGroup = registry._resolve_process_group(name)
    return group


def hold(tensor: torch.Tensor, group: str) -> None:
    """A CUDA graph that is being made, if any, reads this tensor, which is not in its own memory."""
    if (peers := peer_memory.get(group)) is not None:
        peers.hold(tensor)


def count_sent(kind: str, tensor: torch.Tensor, share: float = 1.0) -> None:
    """Notes that `share` of a tensor's bytes left this rank."""
    sent_bytes[kind] += round(tensor.numel() * tensor.element_size() * share)
    sent_calls[kind] += 1


def plan_sent(kind: str, tensor: torch.Tensor, share: float) -> None:
    """Counts in a dry run only: a compiler's fake tensors have the device that they stand for."""
    if tensor.device.type == "meta":
        count_sent(kind, tensor, share)


def plan_window(group: str, use: str, size: int) -> None:
    """Notes in a dry run that a group needs a window of so many bytes. Windows do not shrink."""
    window_bytes[group, use] = max(rounded(size), window_bytes.get((group, use), 0))


def plan_shown(group: str, tensor: torch.Tensor, pieces: int = 1) -> None:
    """The same of a tensor that would be shown, or of so many like it at once: two windows take turns."""
    if tensor.device.type == "meta":
        for use in ("shown", "shown next"):
            plan_window(group, use, pieces * tensor.numel() * tensor.element_size())


@torch.library.custom_op("lightloom::all_to_all", mutates_args=())
def all_to_all(tensor: torch.Tensor, group: str) -> torch.Tensor:
    """Piece i of dimension 0 goes to rank i; what comes back is piece i from rank i. [n, ...] to [n, ...]."""
    count_sent("all_to_all", tensor, 1 - 1 / tensor.shape[0])
    if (peers := peer_memory.get(group)) is not None:
        return peers.all_to_all(tensor)
    tensor = tensor.contiguous()
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received, tensor, group=group_of(group))
    return received


@all_to_all.register_fake
def _(tensor: torch.Tensor, group: str) -> torch.Tensor:
    plan_sent("all_to_all", tensor, 1 - 1 / tensor.shape[0])
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@torch.library.custom_op("lightloom::all_reduce", mutates_args=())
def all_reduce(tensor: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """The sum over the group's `size` ranks."""
    count_sent("all_reduce", tensor, 2 * (1 - 1 / size))
    if size <= READ_TO_SUM_UP_TO and (peers := peer_memory.get(group)) is not None:
        return peers.all_reduce(tensor, size)
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group_of(group))
    return total


@all_reduce.register_fake
def _(tensor: torch.Tensor, group: str, size: int) -> torch.Tensor:
    plan_sent("all_reduce", tensor, 2 * (1 - 1 / size))
    if size <= READ_TO_SUM_UP_TO:
        plan_shown(group, tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@torch.library.custom_op("lightloom::all_gather", mutates_args=())
def all_gather(tensor: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """Everybody's tensor, stacked by rank: [...] to [size, ...]."""
    count_sent("all_gather", tensor, size - 1)
    if (peers := peer_memory.get(group)) is not None:
        return peers.all_gather(tensor, size)
    gathered = tensor.new_empty((size, *tensor.shape))
    dist.all_gather_into_tensor(gathered.flatten(0, 1), tensor.contiguous(), group=group_of(group))
    return gathered


@all_gather.register_fake
def _(tensor: torch.Tensor, group: str, size: int) -> torch.Tensor:
    plan_sent("all_gather", tensor, size - 1)
    plan_shown(group, tensor)
    return tensor.new_empty((size, *tensor.shape))


@torch.library.custom_op("lightloom::reduce_scatter", mutates_args=())
def reduce_scatter(tensor: torch.Tensor, group: str) -> torch.Tensor:
    """Piece i of dimension 0, summed over the group, for rank i: [n, ...] to [...]."""
    count_sent("reduce_scatter", tensor, 1 - 1 / tensor.shape[0])
    if (peers := peer_memory.get(group)) is not None:
        return peers.reduce_scatter(tensor)
    tensor = tensor.contiguous()
    mine = torch.empty_like(tensor[0])
    dist.reduce_scatter_tensor(mine, tensor.flatten(0, 1), group=group_of(group))
    return mine


@reduce_scatter.register_fake
def _(tensor: torch.Tensor, group: str) -> torch.Tensor:
    plan_sent("reduce_scatter", tensor, 1 - 1 / tensor.shape[0])
    plan_shown(group, tensor)
    return torch.empty_like(tensor[0], memory_format=torch.contiguous_format)


@torch.library.custom_op("lightloom::all_to_all_uneven", mutates_args=())
def all_to_all_uneven(
    tensor: torch.Tensor, sent: Sequence[int], received: Sequence[int], rank: int, group: str
) -> torch.Tensor:
    """Pieces of dimension 0 go to their ranks, and pieces of other sizes come back.

    Args:
        sent, received: entries for and from each rank.
        rank: this one's place in the group; its own piece crosses no wire.
    """
    tensor = tensor.contiguous()
    incoming = tensor.new_empty((sum(received), *tensor.shape[1:]))
    dist.all_to_all_single(incoming, tensor, list(received), list(sent), group=group_of(group))
    count_sent("all_to_all_uneven", tensor, 1 - sent[rank] / max(1, tensor.shape[0]))
    return incoming


@all_to_all_uneven.register_fake
def _(tensor: torch.Tensor, sent: Sequence[int], received: Sequence[int], rank: int, group: str) -> torch.Tensor:
    plan_sent("all_to_all_uneven", tensor, 1 - sent[rank] / max(1, tensor.shape[0]))
    return tensor.new_empty((sum(received), *tensor.shape[1:]))


def fill_halo(room: torch.Tensor, dim: int, before: int, behind: int, group: str, rank: int, size: int) -> None:
    """Neighbours' edges into a room's first `before` and last `behind` rows; its own piece lies between them.

    Args:
        room: [B, C, ..., H, W]; on a GPU, with the channels last.
        dim: -2 or -1.
    """
    # For a compiler an operator; without one, calling an operator takes longer than what it does.
    fill = _fill_halo_operator if torch.compiler.is_compiling() else _fill_halo
    fill(room, dim, before, behind, group, rank, size)


@torch.library.custom_op("lightloom::fill_halo", mutates_args=("room",))
def _fill_halo_operator(
    room: torch.Tensor, dim: int, before: int, behind: int, group: str, rank: int, size: int
) -> None:
    _fill_halo(room, dim, before, behind, group, rank, size)


@_fill_halo_operator.register_fake
def _(room: torch.Tensor, dim: int, before: int, behind: int, group: str, rank: int, size: int) -> None:
    return None


def _fill_halo(room: torch.Tensor, dim: int, before: int, behind: int, group: str, rank: int, size: int) -> None:
    if room.is_meta:
        return
    peers = peer_memory.get(group)
    # A compiler may have laid the room out otherwise.
    if peers is not None and room.is_cuda and has_compiler() and channels_last(room):
        peers.edges.fill(room, dim, before, behind, size)
    else:
        _copy_halo(room, dim, (before, behind), group, rank, size)
    # The piece behind wants our last rows, the piece before our first.
    for rows, wanted in ((before, rank < size - 1), (behind, rank > 0)):
        if wanted:
            count_sent("halo", room, rows / room.shape[dim])


def _copy_halo(room: torch.Tensor, dim: int, reach: tuple[int, int], group: str, rank: int, size: int) -> None:
    """`fill_halo` by copies, with what carries the edges in between."""
    before, behind = reach
    rows = room.shape[dim] - before - behind
    # Channels come last, as they mostly lie.
    last, first = room.narrow(dim, rows, before), room.narrow(dim, before, behind)
    own = torch.cat([last, first], dim).movedim(1, -1).contiguous()
    if (peers := peer_memory.get(group)) is not None:
        shown = peers.show(own, size)
        above, below = (shown[other] if 0 <= other < size else None for other in (rank - 1, rank + 1))
    else:
        above, below = _exchange(own, group_of(group), rank, size)
    edges = (
        (above, room.narrow(dim, 0, before), 0),
        (below, room.narrow(dim, before + rows, behind), before),
    )
    for theirs, place, start in edges:
        if theirs is None:
            place.zero_()
        else:
            place.copy_(theirs.narrow(dim - 1, start, place.shape[dim]).movedim(-1, 1))


def _exchange(
    own: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The edges of the neighbour before and of the one behind, for one's own."""
    others = [other if 0 <= other < size else None for other in (rank - 1, rank + 1)]
    received = [None if other is None else torch.empty_like(own) for other in others]
    operations = [
        dist.P2POp(operation, edges, group=group, group_peer=other)
        for other, theirs in zip(others, received, strict=True)
        for operation, edges in ((dist.isend, own), (dist.irecv, theirs))
        if other is not None and edges is not None
    ]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return received[0], received[1]
