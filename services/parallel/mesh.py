"""The ranks of a group as a mesh: one process group for each axis, made once, in the same order on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from services.parallel.collectives import READ_TO_SUM_UP_TO, peer_memory
from services.parallel.degrees import AXES, Degrees
from services.parallel.peer_memory import connect

# Longer than any pause between two ticks: an idle group beats once a second.
TIMEOUT = timedelta(minutes=5)
# Along these, ranks hold the same blocks and heads.
SHARING = ("cfg", "replica", "ring", "ulysses")


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the mesh as this rank sees it.

    Attributes:
        name: of the process group, as collectives take it.
        size: ranks along the axis; rank: this one's place.
        group: the process group; None on an axis of one rank, and where nothing is sent.
        ranks: world ranks along the axis, in order.
    """

    name: str
    size: int
    rank: int
    group: dist.ProcessGroup | None
    ranks: tuple[int, ...]


class Mesh:
    """The axes of `Degrees`, and the two that span several: the sequence (ring x ulysses) and HSDP's.

    Args:
        rank: of this process in the group.
        device_type: "cpu" (gloo) or "cuda" (NCCL).
    """

    def __init__(self, degrees: Degrees, rank: int, device_type: str) -> None:
        self.degrees = degrees
        self.rank = rank
        self.device_type = device_type
        self._axes = {axis: self._make((axis,)) for axis in AXES}
        self.sequence = self._make(("ring", "ulysses"))
        self.sharing = self._make(SHARING)

    def __getitem__(self, axis: str) -> Axis:
        """One of AXES."""
        return self._axes[axis]

    @property
    def active(self) -> frozenset[str]:
        """The axes with several ranks, "hsdp", and "AXIS by peers" for axes whose ranks send by peers' memory alone."""
        axes = {axis for axis in AXES if self.degrees.size(axis) > 1}
        by_peers = {axis for axis in axes if self[axis].name in peer_memory}
        # Where tokens are not scattered, more ranks than that sum by NCCL.
        if self.degrees.size("tensor") > READ_TO_SUM_UP_TO and not self.degrees.tensor_sequence:
            by_peers.discard("tensor")
        hsdp = {"hsdp"} if self.degrees.hsdp else set()
        return frozenset(axes | hsdp | {f"{axis} by peers" for axis in by_peers})

    def hsdp(self) -> Axis:
        """Ranks that hold shards of the same weights, all of them together whole; the other such groups are replicas.

        They lie next to each other among those that hold the same blocks and heads.
        """
        shards = self.degrees.hsdp_shard
        lines = self._lines(SHARING)
        pieces = [ranks[first : first + shards] for ranks in lines for first in range(0, len(ranks), shards)]
        return self._axis(pieces, "hsdp")

    def _make(self, axes: tuple[str, ...]) -> Axis:
        return self._axis(list(self._lines(axes)), " ".join(axes))

    def _axis(self, lines: Sequence[list[int]], planned: str) -> Axis:
        """This rank's of the lines, in which all ranks are; `planned` names it where there is no group."""
        mine: Axis | None = None
        for ranks in lines:
            if len(ranks) == 1:
                mine = mine or (Axis("", 1, 0, None, (self.rank,)) if self.rank in ranks else None)
                continue
            # Every rank makes every group, in the same order: that is the library's rule.
            group = self._group(ranks)
            if self.rank in ranks:
                self._connect(group)
                name = group.group_name if group else f"planned {planned}"
                mine = Axis(name, len(ranks), ranks.index(self.rank), group, tuple(ranks))
        assert mine is not None
        return mine

    def _connect(self, group: dist.ProcessGroup | None) -> None:
        """Ranks whose GPUs see each other's memory use it."""
        if group is not None and self.device_type == "cuda" and (peers := connect(group)) is not None:
            peer_memory[group.group_name] = peers

    def _group(self, ranks: list[int]) -> dist.ProcessGroup | None:
        group: dist.ProcessGroup | None = dist.new_group(ranks, timeout=TIMEOUT)
        return group

    def _lines(self, axes: tuple[str, ...]) -> Iterator[list[int]]:
        """The world's ranks in lines along the axes: equal in all other coordinates."""
        lines: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.degrees.world):
            place = self.degrees.coordinates(rank)
            others = tuple(value for axis, value in place.items() if axis not in axes)
            lines.setdefault(others, []).append(rank)
        yield from lines.values()


class PlannedMesh(Mesh):
    """The axes as one rank would see them, without process groups: for dry runs on the meta device."""

    def __init__(self, degrees: Degrees, rank: int) -> None:
        super().__init__(degrees, rank, "meta")

    def _group(self, _ranks: list[int]) -> dist.ProcessGroup | None:
        return None
