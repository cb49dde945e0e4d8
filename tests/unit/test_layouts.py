"""A layout that does not fit its model is refused by the model's configs alone, before a cluster has any process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightloom.cluster_config import ClusterConfig, ModelEntry, stage_table
from lightloom.layouts import refusal, special_stages
from services.config import EngineSection, ParallelSection, parse
from services.families import load_family


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A model without its weights."""
    folder = tmp_path_factory.mktemp("wan")
    load_family("wan").tiny(folder, "t2v", 0)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


def refused(folder: Path, kind: str, **sections) -> str:
    table = {"source": str(folder), "device": "cpu", **sections}
    config = ClusterConfig(models={"clips": parse(ModelEntry, table)})
    # As it travels to the process that checks.
    return refusal("clips", kind, json.loads(json.dumps(stage_table(config, "clips", kind))))


@pytest.mark.parametrize(
    ("kind", "section", "degrees", "words"),
    [
        ("dit", "parallel", {"tensor_parallel_size": 4}, "does not divide the 6 attention heads: use 1, 2, 3, 6"),
        ("dit", "parallel", {"pipeline_parallel_size": 9}, "is more than the 4 blocks: use 1 to 4"),
        ("dit", "parallel", {"ulysses_degree": 2, "enable_expert_parallel": True}, "no experts"),
        ("text_encoder", "text_parallel", {"tensor_parallel_size": 3}, "does not divide the 2 attention heads"),
        ("vae", "vae_parallel", {"vae_patch_parallel_size": 999}, "latents along the longest side of a picture"),
    ],
)
def test_a_layout_that_does_not_fit_names_its_model_and_stage(bare, kind, section, degrees, words):
    said = refused(bare, kind, **{section: degrees})
    assert said.startswith(f"model 'clips', {kind}: ") and words in said


@pytest.mark.parametrize(
    ("kind", "section", "degrees"),
    [
        ("dit", "parallel", {"tensor_parallel_size": 2, "pipeline_parallel_size": 4, "cfg_parallel_size": 2}),
        ("dit", "parallel", {"hsdp_shard_size": 2, "hsdp_replicate_size": 2}),
        ("text_encoder", "text_parallel", {"tensor_parallel_size": 2}),
        ("vae", "vae_parallel", {"vae_patch_parallel_size": 2}),
    ],
)
def test_a_layout_that_fits_is_let_through(bare, kind, section, degrees):
    assert refused(bare, kind, **{section: degrees}) == ""


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"features": {"graphs": {}}}, "'graphs' cannot be used here: a graph is of a CUDA device's launches"),
        ({"features": {"compile": {"modes": "x"}}}, "modes"),
        ({"engine": {"offload_experts": True}, "parallel": {"hsdp_shard_size": 2}}, "does not go with hsdp"),
        ({"engine": {"offload_experts": True}, "features": {"compile": {}}}, ""),
    ],
)
def test_a_feature_that_does_not_fit_is_refused_like_a_layout(bare, sections, words):
    said = refused(bare, "dit", **sections)
    assert words in said if words else not said


def test_experts_of_a_model_of_one_do_not_wait(tmp_path):
    load_family("qwen_image").tiny(tmp_path, "t2i", 0)
    assert "needs a model of several experts" in refused(tmp_path, "dit", engine={"offload_experts": True})


def test_only_replicas_with_something_special_are_asked_about():
    models = {
        "alone": ModelEntry(source="nowhere"),
        "spread": ModelEntry(source="nowhere", text_parallel=ParallelSection(tensor_parallel_size=2)),
        "compiled": ModelEntry(source="nowhere", features={"compile": {}}),
        "offloaded": ModelEntry(source="nowhere", engine=EngineSection(offload_experts=True)),
    }
    stages = [(model, kind) for model, kind, _ in special_stages(ClusterConfig(models=models))]
    assert stages == [("spread", "text_encoder"), ("compiled", "dit"), ("offloaded", "dit")]
