"""Every layout against one process, requests interleaved and aborted; variants that differ little take turns."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import ROWS
from tests.oracle.harness import difference
from tests.parallel.jobs import Script

SEQUENCE = {"tensor_sequence_parallel": True}
TWO = {
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "cfg": {"cfg_parallel_size": 2},
    "tensor": {"tensor_parallel_size": 2},
    "tensor-sequence": {"tensor_parallel_size": 2, **SEQUENCE},
    "pipeline": {"pipeline_parallel_size": 2},
    "hsdp": {"hsdp_shard_size": 2},
}
# Branches stand at even places: the first variant of every family has guidance (see `share_of`).
FOUR = {
    "cfg-ulysses": {"cfg_parallel_size": 2, "ulysses_degree": 2},
    "ulysses-ring": {"ulysses_degree": 2, "ring_degree": 2},
    "tensor-cfg": {"tensor_parallel_size": 2, "cfg_parallel_size": 2},
    "hsdp-ulysses": {"hsdp_shard_size": 2, "hsdp_replicate_size": 2, "ulysses_degree": 2},
    "pipeline-cfg": {"pipeline_parallel_size": 2, "cfg_parallel_size": 2},
    "hsdp-tensor": {"hsdp_shard_size": 2, "tensor_parallel_size": 2},
    "tensor-sequence-cfg": {"tensor_parallel_size": 2, "cfg_parallel_size": 2, **SEQUENCE},
    "tensor-sequence-hsdp": {"tensor_parallel_size": 2, "hsdp_shard_size": 2, **SEQUENCE},
    "tensor-sequence-ulysses": {"tensor_parallel_size": 2, "ulysses_degree": 2, **SEQUENCE},
    "tensor-sequence-pipeline": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, **SEQUENCE},
    "ulysses-4": {"ulysses_degree": 4},
    "ring-4": {"ring_degree": 4},
    "pipeline-4": {"pipeline_parallel_size": 4},
}
NAMES = [str(row) for row in ROWS]
VARIANTS = {row.family: [str(other) for other in ROWS if other.family == row.family] for row in ROWS}
# The first of each family, and those whose blocks differ from its blocks, go through every layout of two ranks.
CUTS = [variants[0] for variants in VARIANTS.values()] + [
    "qwen_image-edit_2511",
    "wan-vace",
    "wan-i2v_one_expert",
]
Layouts = dict[str, dict[str, int]]


def two_of(name: str) -> Layouts:
    """The layouts of two ranks that fall to a row."""
    return TWO if name in CUTS else share_of(name, TWO, [other for other in NAMES if other not in CUTS])


def share_of(name: str, layouts: Layouts, among: list[str] = NAMES) -> Layouts:
    """The layouts that fall to a row: the variants of a family, which have one plan, take turns."""
    [variants] = [[other for other in variants if other in among] for variants in VARIANTS.values() if name in variants]
    of_turn = {layout: variants[turn % len(variants)] for turn, layout in enumerate(layouts)}
    return {layout: parallel for layout, parallel in layouts.items() if of_turn[layout] == name}


def world_of(parallel: dict[str, int]) -> int:
    work = 1
    for name, degree in parallel.items():
        if not name.startswith("hsdp"):
            work *= degree
    weights = parallel.get("hsdp_shard_size", 1) * parallel.get("hsdp_replicate_size", 1)
    others = parallel.get("tensor_parallel_size", 1) * parallel.get("pipeline_parallel_size", 1)
    return max(work, weights * others)


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name in NAMES for layout in two_of(name) | share_of(name, FOUR)]
)
def test_a_layout_gives_what_one_process_gives(pool, prepared, name, layout):
    parallel = (TWO | FOUR)[layout]
    subject = prepared(name)
    jobs, stock = subject.jobs(3)
    script = Script(jobs, abort={"r2": 3})
    reports = pool.run("denoise", world_of(parallel), str(subject.folder), parallel, {"max_batch": 8}, script)
    first = reports[0]
    assert set(first.finished) == {"r0", "r1"}
    for request_id, tensors in first.finished.items():
        assert difference(tensors, stock[request_id]) <= 1e-4, request_id
    for report in reports:
        assert report.live_tensors == 0
        assert all(
            torch.equal(tensor, first.finished[request_id][key])
            for request_id, tensors in report.finished.items()
            for key, tensor in tensors.items()
        ), "the ranks' states have drifted apart"


@pytest.mark.parametrize("layout", ["hsdp", "hsdp-ulysses", "tensor-sequence-hsdp"])
@pytest.mark.parametrize("name", ["qwen_image-t2i", "wan-t2v"])
def test_branches_that_share_no_kernels_share_a_gathering_of_weights(pool, prepared, name, layout):
    parallel = (TWO | FOUR)[layout]
    subject = prepared(name)
    jobs, stock = subject.jobs(2)
    arguments = (world_of(parallel), str(subject.folder), parallel, {"max_batch": 8}, Script(jobs))
    short, long = pool.run("denoise", *arguments)[0], pool.run("denoise_long", *arguments)[0]
    # What lies outside the blocks is small at full size; here it is a fifth, and gathered for each branch.
    assert short.sent["hsdp"] < long.sent["hsdp"] < 1.3 * short.sent["hsdp"]
    for request_id, tensors in long.finished.items():
        assert difference(tensors, stock[request_id]) <= 1e-4, request_id
