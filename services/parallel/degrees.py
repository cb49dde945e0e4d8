"""The degrees of a rank group: one validated object that owns them. Imports no torch.

Ranks are numbered with the axes in the order `AXES`, the last one fastest: tensor-parallel ranks are neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from services.config import ParallelSection
from services.errors import StartupError

AXES = ("patch", "cfg", "pipeline", "replica", "ring", "ulysses", "tensor")
# Those of each stage, and what a config calls them.
DIT_AXES = tuple(axis for axis in AXES if axis != "patch")
TEXT_AXES = ("tensor",)
VAE_AXES = ("patch",)
AXIS_KEYS = {
    "patch": "vae_patch_parallel_size",
    "cfg": "cfg_parallel_size",
    "pipeline": "pipeline_parallel_size",
    "ring": "ring_degree",
    "ulysses": "ulysses_degree",
    "tensor": "tensor_parallel_size",
}
PATCH_MODES = ("exact", "tiles")
MAX_WORLD = 1024


@dataclass(frozen=True, slots=True)
class Degrees:
    """How many ways each axis splits the work.

    Attributes:
        cfg: guidance branches on different ranks.
        pipeline: ranges of blocks.
        replica: ranks that do the same work, for HSDP without another axis.
        ring, ulysses: the sequence.
        tensor: linears and heads.
        tensor_sequence: its ranks also share the tokens wherever linears are whole.
        hsdp_shard, hsdp_replicate: weights over the ranks of all axes but pipeline and tensor; 1 and 1: no HSDP.
        expert: experts of MoE blocks are spread over the ranks that share a block.
        patch: pictures in the VAE.
    """

    patch: int = 1
    cfg: int = 1
    pipeline: int = 1
    replica: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1
    tensor_sequence: bool = False
    hsdp_shard: int = 1
    hsdp_replicate: int = 1
    expert: bool = False

    @classmethod
    def of(cls, section: ParallelSection) -> Degrees:
        """From a config, checked.

        Raises:
            StartupError: degrees that are no numbers of ranks or do not multiply to the world, with those that would.
        """
        for field in fields(section):
            value = getattr(section, field.name)
            counted = isinstance(value, int) and not isinstance(value, bool)
            if counted and not (field.name == "world_size" and value == 0):
                _check_degree(f"parallel.{field.name}", value)
        if section.vae_patch_mode not in PATCH_MODES:
            raise StartupError(
                f"parallel.vae_patch_mode {section.vae_patch_mode!r} is unknown: use {' or '.join(PATCH_MODES)}"
            )
        if section.tensor_sequence_parallel and section.tensor_parallel_size == 1:
            raise StartupError(
                "parallel.tensor_sequence_parallel spreads norms over the ranks of tensor_parallel_size, which is 1:"
                " raise it, or turn this off"
            )
        asked = cls(
            patch=section.vae_patch_parallel_size,
            cfg=section.cfg_parallel_size,
            pipeline=section.pipeline_parallel_size,
            ring=section.ring_degree,
            ulysses=section.ulysses_degree,
            tensor=section.tensor_parallel_size,
            tensor_sequence=section.tensor_sequence_parallel,
            hsdp_shard=section.hsdp_shard_size,
            hsdp_replicate=section.hsdp_replicate_size,
            expert=section.enable_expert_parallel,
        )
        return asked._with_replicas()._for_world(section.world_size)._with_experts()._over_hosts(section)

    @property
    def world(self) -> int:
        """Ranks of the group."""
        return math.prod(self.size(axis) for axis in AXES)

    @property
    def sequence(self) -> int:
        """Ranks that share a sequence."""
        return self.ring * self.ulysses

    @property
    def sharing(self) -> int:
        """Ranks that hold the same blocks and heads, and share the experts of those blocks."""
        return self.cfg * self.replica * self.sequence

    @property
    def hsdp(self) -> bool:
        """Whether weights are sharded by HSDP."""
        return self.hsdp_shard * self.hsdp_replicate > 1

    @property
    def words(self) -> str:
        """As people are told: "cfg 2 x ulysses 2, hsdp 4"; empty for one rank."""
        # Ranks that do the same work are there for HSDP, which is named itself.
        axes = " x ".join(f"{axis} {self.size(axis)}" for axis in AXES if self.size(axis) > 1 and axis != "replica")
        more = {
            f"hsdp {self.hsdp_shard}": self.hsdp,
            "tensor sequence": self.tensor_sequence,
            "experts": self.expert,
        }
        return ", ".join(filter(None, (axes, *(word for word, on in more.items() if on))))

    def size(self, axis: str) -> int:
        """Of one of AXES."""
        size: int = getattr(self, axis)
        return size

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on every axis."""
        place = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, self.size(axis))
        return {axis: place[axis] for axis in AXES}

    def _with_replicas(self) -> Degrees:
        """HSDP alone makes its ranks replicas of each other; beside other axes it must cover them exactly."""
        if not self.hsdp:
            return self
        if self.hsdp_shard == 1:
            raise StartupError(
                f"parallel.hsdp_shard_size is 1 beside hsdp_replicate_size {self.hsdp_replicate}: nothing would be"
                " sharded, use a shard size of 2 at least, or neither"
            )
        wanted = self.hsdp_shard * self.hsdp_replicate
        covered = self.cfg * self.sequence
        if wanted % covered:
            raise StartupError(
                f"parallel: hsdp_shard_size x hsdp_replicate_size is {wanted}, and must be a multiple of"
                f" cfg_parallel_size x ulysses_degree x ring_degree = {covered}: use a shard size of"
                f" {_divisors(covered, 2)}, with the replicate size that completes {covered}"
            )
        return replace(self, replica=wanted // covered)

    def _with_experts(self) -> Degrees:
        if self.expert and self.sharing == 1:
            raise StartupError(
                "parallel.enable_expert_parallel spreads experts over the ranks that share a block, and there is 1:"
                " raise cfg_parallel_size, ulysses_degree, ring_degree or HSDP's sizes"
            )
        return self

    def _for_world(self, world_size: int) -> Degrees:
        if world_size not in (0, self.world):
            factors = " x ".join(f"{axis} {self.size(axis)}" for axis in AXES if self.size(axis) > 1) or "1"
            raise StartupError(
                f"parallel.world_size is {world_size}, but the degrees multiply to {self.world} ({factors}): leave"
                f" world_size out, or use degrees that divide it: {_divisors(world_size)}"
            )
        if self.world > MAX_WORLD:
            raise StartupError(f"parallel: {self.world} ranks in a group, at most {MAX_WORLD} are allowed")
        return self

    def _over_hosts(self, section: ParallelSection) -> Degrees:
        hosts = len(section.hosts) + 1
        if hosts > 1 and not section.leader_address:
            raise StartupError("parallel.hosts needs leader_address: this host's address as the others reach it")
        if self.world % hosts:
            raise StartupError(
                f"parallel: {self.world} ranks cannot be shared equally by {hosts} hosts: use a number of ranks that"
                f" {hosts} divides"
            )
        return self


def check_axes(degrees: Degrees, axes: Sequence[str], stage: str) -> None:
    """Not every stage can be spread in every way.

    Raises:
        StartupError: it is to be spread along another axis than `axes`, with those that it has.
    """
    if degrees.world > 1 and not axes:
        raise StartupError(f"parallel: the degrees make {degrees.world} ranks, and the {stage} stage runs on 1")
    others = any(degrees.size(axis) > 1 for axis in AXES if axis not in axes)
    if others or ("cfg" not in axes and (degrees.tensor_sequence or degrees.hsdp or degrees.expert)):
        keys = ", ".join(AXIS_KEYS[axis] for axis in axes if axis in AXIS_KEYS)
        raise StartupError(f"parallel: the {stage} stage is spread over ranks by {keys} only: leave other keys out")


def check_heads(degrees: Degrees, heads: int) -> None:
    """Heads are not cut in tensor parallelism; Ulysses pads them.

    Raises:
        StartupError: they do not divide, with the degrees that would.
    """
    if heads % degrees.tensor:
        raise StartupError(
            f"parallel.tensor_parallel_size {degrees.tensor} does not divide the {heads} attention heads: use"
            f" {_divisors(heads)}"
        )


def check_features(tensor: int, features: int, layer: str) -> None:
    """A layer's features are cut in tensor parallelism, each kind of them for itself.

    Raises:
        StartupError: they do not divide, with the degrees that would.
    """
    if features % tensor:
        raise StartupError(
            f"parallel.tensor_parallel_size {tensor} does not divide the {features} features of {layer}: use"
            f" {_divisors(features)}"
        )


def check_devices(degrees: Degrees, hosts: int, devices: int) -> None:
    """Every rank of a host needs a GPU of its own.

    Raises:
        StartupError: the host has fewer.
    """
    ranks = degrees.world // hosts
    if ranks > devices:
        raise StartupError(
            f"parallel: {ranks} ranks need a CUDA device each, and this host has {devices}: let the degrees multiply to"
            f" {max(1, devices * hosts)} at most"
        )


def check_patches(ranks: int, mode: str, tile_px: int, longest: int) -> None:
    """The VAE's ranks share pictures.

    Args:
        longest: latents along the longer side of the largest picture.

    Raises:
        StartupError: nothing says into what they are to be cut, or there are more ranks than pieces.
    """
    check_tiles(mode, tile_px)
    if ranks > longest:
        raise StartupError(
            f"parallel.vae_patch_parallel_size {ranks} is more than the {longest} latents along the longest side of a"
            f" picture: use 1 to {longest}"
        )


def check_tiles(mode: str, tile_px: int) -> None:
    """Raises StartupError where the way in which ranks share pictures and a tile's side do not go together."""
    if mode == "tiles" and not tile_px:
        raise StartupError(
            "parallel.vae_patch_mode is tiles, and engine.tile_px is 0: give it a tile's side, as 512, or use exact"
        )
    if mode == "exact" and tile_px:
        raise StartupError(
            f"parallel.vae_patch_mode is exact, which cuts no tiles, and engine.tile_px is {tile_px}: set it to 0, or"
            " use tiles"
        )


def check_blocks(degrees: Degrees, blocks: int) -> None:
    """Every rank of a pipeline needs a block.

    Raises:
        StartupError: there are fewer blocks than ranks.
    """
    if degrees.pipeline > blocks:
        raise StartupError(
            f"parallel.pipeline_parallel_size {degrees.pipeline} is more than the {blocks} blocks: use 1 to {blocks}"
        )


def split_sizes(total: int, parts: int) -> list[int]:
    """Nearly equal sizes, larger ones first: 10 in 4 is 3, 3, 2, 2."""
    small, larger = divmod(total, parts)
    return [small + (index < larger) for index in range(parts)]


def _check_degree(name: str, value: int) -> None:
    if not 1 <= value <= MAX_WORLD:
        raise StartupError(f"{name} is {value}: it must be between 1 and {MAX_WORLD}")


def _divisors(number: int, least: int = 1) -> str:
    return ", ".join(str(value) for value in range(least, number + 1) if number % value == 0)
