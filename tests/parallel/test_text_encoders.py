"""Text encoders over ranks: the embeddings of one process, what each rank holds, what does not fit."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

from services.config import ParallelSection
from services.encoder_plans import LLAMA
from services.errors import StartupError
from services.families import FAMILIES, load_family
from services.parallel.degrees import TEXT_AXES, Degrees, check_axes
from services.parallel.encoder import ColumnEmbedding, EncoderPartition
from services.parallel.mesh import PlannedMesh
from services.weights import open_source
from tests.oracle.harness import difference
from tests.parallel.jobs import Prompts, bytes_of, config_of, encode_all, modules_in
from tests.parallel.test_layouts import NAMES

META = torch.device("meta")
PRESETS = [(family, preset) for family in FAMILIES for preset in load_family(family).presets]


def encoders_of(source, ranks: int, rank: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Module]:
    """A rank's share of every encoder, without weights."""
    part = load_family(source.family).text
    mesh = PlannedMesh(Degrees(tensor=ranks), rank)
    encoders = {subfolder: EncoderPartition(plan, mesh) for subfolder, plan in part.plans.items()}
    return modules_in(part.load(replace(source.without_weights(), encoders=encoders), META, dtype))


def spread_bytes(source, ranks: int, rank: int = 0) -> int:
    """Of those that are spread; on one rank they are whole."""
    modules = encoders_of(source, ranks, rank, torch.bfloat16)
    return sum(bytes_of(module) for module in modules if any(isinstance(p, ColumnEmbedding) for p in module.modules()))


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_encode_what_one_encodes(pool, prepared, name):
    """Batches, a prompt that comes again, one that is aborted; and every rank holds what the arithmetic says."""
    subject = prepared(name)
    wish = subject.subject.params(subject.row.wishes[0])
    texts = {"r0": "a red circle", "r1": "a small blue square on a white background", "r2": "a cat", "r3": "a"}
    requests = {request_id: replace(wish, prompt=text) for request_id, text in texts.items()}
    prompts = Prompts(requests, aborted=("r1",), later={"again": requests["r2"], "late": requests["r1"]})
    folder = str(subject.folder)
    alone = encode_all(config_of(folder, ParallelSection(), {"max_batch": 2}), None, prompts)
    reports = pool.run("encode", 2, folder, prompts)
    for rank, report in enumerate(reports):
        assert report.tensors.keys() == alone.tensors.keys() == {"r0", "r2", "r3", "again", "late"}
        assert report.cached == alone.cached == {"again"}
        assert report.metrics == alone.metrics
        for request_id, tensors in alone.tensors.items():
            assert difference(report.tensors[request_id], tensors) <= 1e-4
            for key, tensor in tensors.items():
                assert torch.equal(report.tensors[request_id][key], reports[0].tensors[request_id][key])
                assert report.tensors[request_id][key].dtype == tensor.dtype
        assert report.weight_bytes == sum(map(bytes_of, encoders_of(open_source(folder), 2, rank)))
        assert report.weight_bytes < alone.weight_bytes


@pytest.mark.parametrize(("family", "preset"), PRESETS)
def test_two_ranks_hold_half_of_every_large_encoder_each(family, preset):
    source = open_source("random:0", family=family, preset=preset)
    whole = spread_bytes(source, 1)
    for rank in range(2):
        assert whole / 2 <= spread_bytes(source, 2, rank) <= 0.52 * whole


@pytest.mark.parametrize("ranks", [1, 2, 4, 7, 14, 28])
def test_key_and_value_heads_are_split_or_held_by_several_ranks(ranks):
    """28 query heads share 4 of keys and values: seven queries in a row see one."""
    with torch.device("meta"):
        heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
        config = LlamaConfig(hidden_size=28 * 8, intermediate_size=56, num_hidden_layers=1, **heads)
        whole = LlamaModel(config)
    for rank in range(ranks):
        module, mesh = copy.deepcopy(whole), PlannedMesh(Degrees(tensor=ranks), rank)
        if 4 % ranks and ranks % 4:
            with pytest.raises(StartupError, match=f"{ranks} neither divides the 4 key and value heads nor"):
                EncoderPartition(LLAMA, mesh).apply(module)
            continue
        cut = EncoderPartition(LLAMA, mesh).apply(module)["layers.0.self_attn.k_proj.weight"]
        [(first, end)] = cut.ranges
        attention = module.layers[0].self_attn
        own = range(rank * 28 // ranks, (rank + 1) * 28 // ranks)
        seen = [first // 8 + query // attention.num_key_value_groups for query in range(len(own))]
        assert seen == [query // 7 for query in own]
        assert end // 8 == seen[-1] + 1


def test_ranks_that_do_not_divide_the_heads_are_refused_before_weights_are_read(prepared):
    source = open_source(str(prepared("wan-t2v").folder))
    with pytest.raises(StartupError, match="tensor_parallel_size 3 does not divide the 2 attention heads: use 1, 2"):
        encoders_of(source, 3)


@pytest.mark.parametrize(
    "section",
    [
        {"ulysses_degree": 2},
        {"tensor_parallel_size": 2, "cfg_parallel_size": 2},
        {"tensor_parallel_size": 2, "tensor_sequence_parallel": True},
        {"tensor_parallel_size": 2, "hsdp_shard_size": 2},
        {"hsdp_shard_size": 2},
    ],
)
def test_other_ways_of_spreading_are_refused(section):
    with pytest.raises(StartupError, match="TextEncoder stage is spread over ranks by tensor_parallel_size only"):
        check_axes(Degrees.of(ParallelSection(**section)), TEXT_AXES, "TextEncoder")
