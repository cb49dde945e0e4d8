"""Layouts that cannot work are refused before a weight is read, with numbers that would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from services.config import ModelSection, ParallelSection, ServiceSection, StageConfig
from services.errors import StartupError
from services.families import FAMILIES, load_family
from services.family import ModelPlan
from services.lockstep import join_group
from services.parallel.degrees import (
    AXES,
    Degrees,
    check_blocks,
    check_devices,
    check_features,
    check_heads,
    split_sizes,
)
from services.parallel.mesh import Axis, PlannedMesh
from services.parallel.partition import Partition
from services.parallel.tensor import split_linears
from services.weights import ModelSource, open_source

META = torch.device("meta")


def of(**section: object) -> Degrees:
    return Degrees.of(ParallelSection(**section))


def refused(**section: object) -> str:
    with pytest.raises(StartupError) as caught:
        of(**section)
    return str(caught.value)


# ---- Degrees alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, ""),
        ({"cfg_parallel_size": 2, "ulysses_degree": 2}, "cfg 2 x ulysses 2"),
        ({"hsdp_shard_size": 2, "hsdp_replicate_size": 2}, "hsdp 2"),
        ({"ulysses_degree": 4, "hsdp_shard_size": 4}, "ulysses 4, hsdp 4"),
        ({"tensor_parallel_size": 2, "tensor_sequence_parallel": True}, "tensor 2, tensor sequence"),
        ({"ring_degree": 2, "enable_expert_parallel": True}, "ring 2, experts"),
        ({"vae_patch_parallel_size": 2}, "patch 2"),
    ],
)
def test_a_layout_in_words(keys, words):
    assert of(**keys).words == words


@pytest.mark.parametrize("value", [0, -1, 1025])
@pytest.mark.parametrize(
    "key",
    [
        "cfg_parallel_size",
        "pipeline_parallel_size",
        "ulysses_degree",
        "ring_degree",
        "tensor_parallel_size",
        "hsdp_shard_size",
        "hsdp_replicate_size",
    ],
)
def test_a_degree_is_a_number_of_ranks(key, value):
    assert refused(**{key: value}) == f"parallel.{key} is {value}: it must be between 1 and 1024"


@pytest.mark.parametrize("value", [-1, 1025])
def test_a_world_is_a_number_of_ranks(value):
    assert refused(world_size=value) == f"parallel.world_size is {value}: it must be between 1 and 1024"


def test_degrees_multiply_to_the_world():
    assert of(world_size=4, ulysses_degree=2, cfg_parallel_size=2).world == 4
    assert of(ulysses_degree=2, ring_degree=3).world == 6
    assert refused(world_size=8, ulysses_degree=2, cfg_parallel_size=2) == (
        "parallel.world_size is 8, but the degrees multiply to 4 (cfg 2 x ulysses 2): leave world_size out, or use"
        " degrees that divide it: 1, 2, 4, 8"
    )
    assert "multiply to 1 (1)" in refused(world_size=2)


def test_a_group_has_a_largest_size():
    assert refused(ulysses_degree=64, tensor_parallel_size=32) == (
        "parallel: 2048 ranks in a group, at most 1024 are allowed"
    )


@pytest.mark.parametrize(
    ("section", "replicas", "world"),
    [
        ({"hsdp_shard_size": 2}, 2, 2),
        ({"hsdp_shard_size": 2, "ulysses_degree": 2}, 1, 2),
        ({"hsdp_shard_size": 2, "hsdp_replicate_size": 2, "ulysses_degree": 2}, 2, 4),
        ({"hsdp_shard_size": 2, "hsdp_replicate_size": 2, "cfg_parallel_size": 2, "ring_degree": 2}, 1, 4),
        ({"hsdp_shard_size": 4, "tensor_parallel_size": 2}, 4, 8),
        ({"hsdp_shard_size": 2, "pipeline_parallel_size": 2}, 2, 4),
    ],
)
def test_hsdp_covers_the_ranks_that_hold_the_same_blocks(section, replicas, world):
    degrees = of(**section)
    assert (degrees.replica, degrees.world) == (replicas, world)


def test_hsdp_that_does_not_cover_is_refused():
    assert refused(hsdp_shard_size=2, ulysses_degree=4) == (
        "parallel: hsdp_shard_size x hsdp_replicate_size is 2, and must be a multiple of cfg_parallel_size x"
        " ulysses_degree x ring_degree = 4: use a shard size of 2, 4, with the replicate size that completes 4"
    )
    assert "= 6: use a shard size of 2, 3, 6," in refused(hsdp_shard_size=4, ring_degree=3, cfg_parallel_size=2)
    assert "hsdp_shard_size is 1 beside hsdp_replicate_size 2" in refused(hsdp_replicate_size=2, ulysses_degree=2)


def test_coordinates_number_all_ranks_with_tensor_ranks_side_by_side():
    degrees = Degrees(cfg=2, pipeline=2, ring=3, ulysses=2, tensor=2)
    places = [degrees.coordinates(rank) for rank in range(degrees.world)]
    assert len({tuple(place.items()) for place in places}) == degrees.world == 48
    assert [place["tensor"] for place in places[:4]] == [0, 1, 0, 1]
    assert tuple(places[0]) == AXES


@pytest.mark.parametrize(("total", "parts", "sizes"), [(10, 4, [3, 3, 2, 2]), (4, 4, [1] * 4), (57, 2, [29, 28])])
def test_sizes_are_nearly_equal_and_larger_ones_come_first(total, parts, sizes):
    assert split_sizes(total, parts) == sizes


# ---- Degrees and a model --------------------------------------------------------------------------------------------


def test_numbers_that_do_not_fit_a_model_are_named_with_those_that_do():
    check_heads(Degrees(tensor=8, ulysses=16), 24)
    with pytest.raises(StartupError) as caught:
        check_heads(Degrees(tensor=5), 24)
    assert str(caught.value) == (
        "parallel.tensor_parallel_size 5 does not divide the 24 attention heads: use 1, 2, 3, 4, 6, 8, 12, 24"
    )
    check_blocks(Degrees(pipeline=4), 4)
    with pytest.raises(StartupError) as caught:
        check_blocks(Degrees(pipeline=5), 4)
    assert str(caught.value) == "parallel.pipeline_parallel_size 5 is more than the 4 blocks: use 1 to 4"
    with pytest.raises(StartupError) as caught:
        check_features(4, 6, "proj")
    assert str(caught.value) == (
        "parallel.tensor_parallel_size 4 does not divide the 6 features of proj: use 1, 2, 3, 6"
    )


def test_more_ranks_than_devices_are_refused():
    check_devices(Degrees(ulysses=8), 2, 4)
    with pytest.raises(StartupError) as caught:
        check_devices(Degrees(ulysses=8), 2, 2)
    assert str(caught.value) == (
        "parallel: 4 ranks need a CUDA device each, and this host has 2: let the degrees multiply to 4 at most"
    )


@pytest.mark.parametrize(("device", "words"), [("cuda", "this host has 0"), ("cuda:1", "use cuda")])
def test_a_rank_looks_for_devices_before_it_joins(device, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = StageConfig(
        service=ServiceSection(port=0),
        model=ModelSection(name="m", source="nowhere", device=device),
        parallel=ParallelSection(ulysses_degree=2),
    )
    # The rendezvous does not exist: nothing has been joined when this is said.
    with pytest.raises(StartupError, match=words):
        join_group(config, 0, 2, "file:///nowhere")


@pytest.mark.parametrize("dim", ["column", "row"])
def test_features_are_never_cut_short(dim):
    module = nn.ModuleDict({"proj": nn.Linear(6, 6)})
    plan = ModelPlan(block_classes=(), **{dim: ("proj",)})
    with pytest.raises(StartupError, match="the 6 features of proj"):
        split_linears(module, plan, Axis("", 4, 0, None, (0, 1, 2, 3)))


def shared(source: ModelSource, degrees: Degrees) -> ModelSource:
    part = load_family(source.family).dit
    return replace(source, partition=Partition(part.plan, part.blocks, PlannedMesh(degrees, 0)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["random", "folder"])
@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        (Degrees(tensor=7), "tensor_parallel_size 7 does not divide the"),
        (Degrees(pipeline=100), "pipeline_parallel_size 100 is more than the"),
    ],
)
def test_a_model_refuses_before_its_weights_are_read_or_made(family, kind, degrees, words, tmp_path, monkeypatch):
    part = load_family(family)
    if kind == "random":
        source = open_source("random:0", family=family, preset=next(iter(part.presets)))
        monkeypatch.setattr(ModelSource, "randomise", None)
    else:
        part.tiny(tmp_path, next(iter(part.variants)), 0)
        source = open_source(str(tmp_path))
        monkeypatch.setattr("services.weights.read_share", None)
    with pytest.raises(StartupError, match=f"^parallel.{words}"):
        part.dit.load(shared(source, degrees), torch.device("cpu"), torch.float32)
