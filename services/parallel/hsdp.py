"""HSDP (arXiv 2304.11277): weights lie in shards over the ranks; those of blocks are gathered a block ahead of use.

Whole weights of blocks are read in two places, which take turns: in one the next block's arrive while this one's are
used in the other. Parts outside of the blocks get a place while they run. Shards never change, so where ranks see each
other's memory a block comes by copies out of the peers' shards, straight to where its weights are read, by copy
engines: nobody waits for anybody, and no multiprocessor is taken from the block that runs. FSDP2 gathers into a buffer
and copies the weights out of it between two blocks (docs/performance.md has both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from services.errors import StartupError
from services.family import Block
from services.parallel.collectives import count_sent, peer_memory
from services.parallel.experts import SpreadExperts
from services.parallel.mesh import Axis

# Where weights begin, as kernels and copies like it.
ALIGNMENT_BYTES = 256
PLACES = 2
# Called before the first use of what is on its way; on a GPU the host does not wait.
Arrival = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """One rank's rows of a weight.

    Attributes:
        first: byte of the shard where they begin, the same on every rank.
        rows: of the whole weight; share: of each rank, the last one's filled up.
        row_bytes: of one.
    """

    first: int
    rows: int
    share: int
    row_bytes: int

    @property
    def size(self) -> int:
        """Bytes of a rank's rows."""
        return self.share * self.row_bytes

    def own(self, rank: int) -> slice:
        """The rows of one rank, which may be none."""
        return slice(min(self.rows, self.share * rank), min(self.rows, self.share * (rank + 1)))


def pieces_of(weights: Iterable[torch.Tensor], ranks: int) -> tuple[list[Piece], int]:
    """How weights lie in shards over so many ranks, and a shard's bytes. A weight without dimensions is one row."""
    pieces, end = [], 0
    for weight in weights:
        rows = weight.shape[0] if weight.ndim else 1
        row_bytes = weight.numel() * weight.element_size() // max(1, rows)
        pieces.append(Piece(end, rows, -(-rows // ranks), row_bytes))
        end += -(-pieces[-1].size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return pieces, end


def weights_of(part: nn.Module) -> list[nn.Parameter]:
    """What is sharded of a block or a part. Spread experts differ from rank to rank over the same ranks already."""
    spread = {
        weight for module in part.modules() if isinstance(module, SpreadExperts) for weight in module.parameters()
    }
    return [weight for weight in part.parameters() if weight not in spread]


class ShardedWeights:
    """Weights of one block or part, of which this rank keeps its shard. They are read where `lay` says."""

    def __init__(self, weights: Sequence[nn.Parameter], axis: Axis, device: torch.device) -> None:
        self._weights, self._axis = weights, axis
        self._peers = peer_memory.get(axis.name)
        self._pieces, size = pieces_of(weights, axis.size)
        if self._peers is None:
            self._shards = {axis.rank: torch.zeros(size, dtype=torch.uint8, device=device)}
        else:
            self._window = self._peers.keep(max(ALIGNMENT_BYTES, size))
            self._shards = {rank: self._window.of(rank, (size,), torch.uint8) for rank in range(axis.size)}
        for weight, piece in zip(weights, self._pieces, strict=True):
            rows = (weight.detach() if weight.ndim else weight.detach()[None])[piece.own(axis.rank)]
            mine = rows.contiguous().flatten().view(torch.uint8)
            self.held[piece.first : piece.first + mine.numel()] = mine
            _forget(weight, device)
        if self._peers is not None:
            self._window.meet()

    @property
    def held(self) -> torch.Tensor:
        """This rank's shard, in bytes."""
        return self._shards[self._axis.rank]

    @property
    def whole_bytes(self) -> int:
        """Of a place for them."""
        return self._axis.size * self.held.numel()

    def lay(self, place: torch.Tensor) -> None:
        """From now on whole weights are read in `place`, bytes, which others may use too."""
        self._place = place
        for weight, piece in zip(self._weights, self._pieces, strict=True):
            start = piece.first * self._axis.size
            whole = place[start : start + piece.rows * piece.row_bytes]
            weight.data = whole.view(weight.dtype).view(weight.shape)

    def leave(self) -> None:
        """Lets go of the place."""
        del self._place
        for weight in self._weights:
            _forget(weight, self.held.device)

    def gather(self) -> Arrival:
        """Starts to make the weights whole in their place, once all is done that has been asked of the device."""
        if self._peers is None:
            return self._gather_pieces()
        with self._peers.aside():
            self._copy()
            return partial(self._peers.wait, self._peers.mark())

    def gather_first(self) -> None:
        """Makes the weights whole before what follows, by copies that wait for none aside."""
        if self._peers is None:
            self._gather_pieces()()
        else:
            self._copy()

    def _copy(self) -> None:
        """Out of the peers' shards."""
        count_sent("hsdp", self.held, self._axis.size - 1)
        for piece in self._pieces:
            for rank, shard in self._shards.items():
                start = piece.first * self._axis.size + piece.size * rank
                self._place[start : start + piece.size].copy_(shard[piece.first : piece.first + piece.size])

    def _gather_pieces(self) -> Arrival:
        """By the process group."""
        count_sent("hsdp", self.held, self._axis.size - 1)
        return partial(_wait_for, [self._gather_piece(piece) for piece in self._pieces if piece.size])

    def _gather_piece(self, piece: Piece) -> dist.Work:
        start = piece.first * self._axis.size
        whole = self._place[start : start + piece.size * self._axis.size]
        mine = self.held[piece.first : piece.first + piece.size]
        work: dist.Work = dist.all_gather_into_tensor(whole, mine, self._axis.group, async_op=True)
        return work


class ShardedBlocks:
    """Blocks with sharded weights, at most two of them whole at a time."""

    def __init__(self, blocks: Sequence[Block], weights: Sequence[ShardedWeights]) -> None:
        self._blocks, self._weights = blocks, weights

    def whole(self) -> Iterator[Block]:
        """The blocks one after the other, each with whole weights until the next one is asked for."""
        arrival = self._weights[0].gather()
        for index, block in enumerate(self._blocks):
            arrival()
            if index + 1 < len(self._blocks):
                arrival = self._weights[index + 1].gather()
            yield block


def shard(
    modules: Mapping[str, nn.Module], blocks: Mapping[str, Sequence[Block]], axis: Axis, device: torch.device
) -> dict[str, ShardedBlocks]:
    """Leaves of every expert's weights this rank's shards, and in all two places for whole blocks.

    Args:
        modules: by expert, on the device or in the host's memory; blocks: those that this rank runs.
        axis: of the ranks that share.
        device: where everything is from now on.

    Raises:
        StartupError: several parts share a weight; nothing has been sharded.
    """
    _check_untied(modules, blocks)
    weights: dict[str, list[ShardedWeights]] = {name: [] for name in modules}
    for name, module in modules.items():
        for part in outside(module, blocks[name]):
            _gather_when_called(part, ShardedWeights(weights_of(part), axis, device))
        for block in blocks[name]:
            weights[name].append(ShardedWeights(weights_of(block.module), axis, device))
        _move_rest(module, device)
    size = max(of.whole_bytes for sharded in weights.values() for of in sharded)
    places = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(PLACES)]
    for sharded in weights.values():
        for index, of in enumerate(sharded):
            of.lay(places[index % PLACES])
    return {name: ShardedBlocks(blocks[name], weights[name]) for name in modules}


def outside(module: nn.Module, blocks: Sequence[Block]) -> Iterator[nn.Module]:
    """The parts with weights that are not in a block: embeddings, projections, the head."""
    inside = {block.module for block in blocks}
    for child in module.children():
        if child in inside:
            continue
        if isinstance(child, nn.ModuleList) or not inside.isdisjoint(child.modules()):
            yield from outside(child, blocks)
        elif any(True for _ in child.parameters()):
            yield child


def _check_untied(modules: Mapping[str, nn.Module], blocks: Mapping[str, Sequence[Block]]) -> None:
    """The second of two parts with the same weight would find its memory gone."""
    seen: set[nn.Parameter] = set()
    for name, module in modules.items():
        for part in (*outside(module, blocks[name]), *(block.module for block in blocks[name])):
            own = set(weights_of(part))
            if tied := seen & own:
                names = " and ".join(_names_of(tied.pop(), modules))
                raise StartupError(f"HSDP does not shard a weight that several parts share: {names}")
            seen |= own


def _names_of(weight: nn.Parameter, modules: Mapping[str, nn.Module]) -> list[str]:
    """Wherever it is."""
    return [
        f"{name}.{path}"
        for name, module in modules.items()
        for path, other in module.named_parameters(remove_duplicate=False)
        if other is weight
    ]


def _wait_for(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


def _gather_when_called(part: nn.Module, weights: ShardedWeights) -> None:
    """Some are called inside of blocks too, so they use no block's place, and do not queue behind the next block."""
    device = weights.held.device

    def come(*_: Any) -> None:
        weights.lay(torch.empty(weights.whole_bytes, dtype=torch.uint8, device=device))
        weights.gather_first()

    part.register_forward_pre_hook(come)
    part.register_forward_hook(lambda *_: weights.leave(), always_call=True)


def _forget(weight: nn.Parameter, device: torch.device) -> None:
    """Its shape stays, its memory goes."""
    weight.data = weight.data.new_zeros((), device=device).expand(weight.shape)


def _move_rest(module: nn.Module, device: torch.device) -> None:
    """Buffers, and weights that are not sharded, to the device."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.to(device)


@dataclass(frozen=True, slots=True)
class Shards:
    """Bytes of one block, or of a part outside of them.

    Attributes:
        whole: its weights.
        held: each rank's shard of them.
        gathered: of the place that it takes while it is whole.
        sent: by the rank, so that it becomes whole everywhere.
    """

    whole: int
    held: int
    gathered: int
    sent: int


def plan_shards(part: nn.Module, ranks: int) -> Shards:
    """What `ShardedWeights` makes of a block or a part, by arithmetic."""
    weights = weights_of(part)
    size = pieces_of(weights, ranks)[1]
    whole = sum(weight.numel() * weight.element_size() for weight in weights)
    return Shards(whole, size, size * ranks, size * (ranks - 1))
