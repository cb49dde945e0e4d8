"""Bytes of weights on each rank: full-size models on the meta device, and what HSDP gathers on real ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from dit_svc.dry_run import DryRun
from services.config import ParallelSection
from services.families import FAMILIES, load_family
from services.parallel.degrees import Degrees
from services.weights import open_source
from tests.parallel.jobs import Script
from tests.parallel.test_layouts import FOUR, NAMES, TWO, share_of

SHARDED = {"hsdp": TWO["hsdp"], "hsdp-tensor": FOUR["hsdp-tensor"]}


def denoisers() -> list[tuple[str, str]]:
    """Family and preset of every full-size denoiser; presets that differ elsewhere share one."""
    found: dict[str, tuple[str, str]] = {}
    for family in FAMILIES:
        for preset, parts in load_family(family).presets.items():
            configs = [parts.get(name) for name in ("transformer", "transformer_2")]
            found.setdefault(repr((family, configs)), (family, preset))
    return list(found.values())


PRESETS = denoisers()


@cache
def weights_of(family: str, preset: str, rank: int = 0, shards: int = 1, **degrees: int):
    source = open_source("random:0", family=family, preset=preset)
    return DryRun(source, Degrees(**degrees), rank, torch.bfloat16).weights(shards)


@cache
def bytes_of_blocks(family: str, preset: str) -> list[int]:
    """Of each block on its own."""
    part = load_family(family).dit
    model = part.load(open_source("random:0", family=family, preset=preset), torch.device("meta"), torch.bfloat16)
    blocks = [block.module for module in model.modules.values() for block in part.blocks(module)]
    return [sum(weight.nbytes for weight in block.parameters()) for block in blocks]


@pytest.mark.parametrize(("family", "preset"), PRESETS)
def test_two_tensor_ranks_hold_half_of_a_full_size_model_each(family, preset):
    whole = weights_of(family, preset).held
    for rank in range(2):
        assert whole / 2 <= weights_of(family, preset, rank, tensor=2).held <= 0.52 * whole


@pytest.mark.parametrize(("family", "preset"), PRESETS)
def test_two_shards_hold_half_and_gather_two_blocks(family, preset):
    whole, largest = weights_of(family, preset).held, max(bytes_of_blocks(family, preset))
    for rank in range(2):
        weights = weights_of(family, preset, rank, shards=2, replica=2)
        # Rows that do not divide, of modulation, lie on the first rank.
        assert weights.held <= 0.501 * whole
        assert weights.held < weights.peak <= 0.501 * whole + 2 * largest


@pytest.mark.parametrize(("family", "preset"), PRESETS)
def test_a_pipelines_ranks_hold_every_block_once_and_all_else_each(family, preset):
    # The first, the last, and one in the middle; most models' blocks do not divide by three.
    ranks = 3
    whole, in_blocks = weights_of(family, preset).held, sum(bytes_of_blocks(family, preset))
    held = [weights_of(family, preset, rank, pipeline=ranks).held for rank in range(ranks)]
    assert sum(held) == in_blocks + ranks * (whole - in_blocks)


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in NAMES for layout in share_of(name, SHARDED)])
def test_at_most_two_blocks_are_whole_when_a_block_runs(pool, prepared, name, layout):
    subject = prepared(name)
    [job], _ = subject.jobs_of(replace(subject.row.wishes[0], steps=2))
    degrees = Degrees.of(ParallelSection(**SHARDED[layout]))
    by_rank = pool.run("gathered_bytes", degrees.world, str(subject.folder), SHARDED[layout], Script([job]))
    for rank, seen in enumerate(by_rank):
        weights = DryRun(open_source(str(subject.folder)), degrees, rank, torch.float32).weights(2)
        assert max(seen) == weights.peak - weights.held > 0
