"""Which features are on: attention by capability always, the rest where a config asks for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_svc.forward import Forward
from services.attention import KERNELS
from services.errors import StartupError
from services.families import load_family
from services.families.qwen_image.cut import QwenStreams
from services.family import DitModel
from services.feature_set import apply_features
from services.features import Beside, BlockRun, attention, graphs
from services.parallel.collectives import peer_memory
from services.parallel.degrees import Degrees
from services.parallel.mesh import PlannedMesh
from services.parallel.peer_memory import PeerMemory
from services.weights import open_source

FAMILY = load_family("qwen_image")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    FAMILY.tiny(folder, "t2i", 0)
    return folder


def applied(tiny: Path, sections: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> tuple[dict, DitModel]:
    model = FAMILY.dit.load(open_source(str(tiny)), torch.device("cpu"), dtype)
    options = apply_features(model, FAMILY.dit, sections).options
    return {name: json.loads(text) for name, text in options.items()}, model


def test_without_a_section_attention_is_chosen_by_capability_and_nothing_is_compiled(tiny):
    options, _ = applied(tiny, {})
    assert options == {"attention": {"backend": "sdpa"}}


@pytest.mark.parametrize(
    ("section", "dtype", "kernel"),
    [
        ({}, torch.bfloat16, "cudnn"),
        ({}, torch.float16, "cudnn"),
        ({}, torch.float32, "sdpa"),
        ({"attention": {}}, torch.bfloat16, "cudnn"),
        ({"attention": {"backend": "sdpa"}}, torch.bfloat16, "sdpa"),
    ],
)
def test_on_hopper_it_is_cudnn_for_what_cudnn_computes_unless_a_config_says_otherwise(
    tiny, monkeypatch, section, dtype, kernel
):
    monkeypatch.setattr(attention, "_hopper", lambda _device: True)
    options, model = applied(tiny, section, dtype)
    assert options["attention"] == {"backend": kernel}
    assert {attend.kernel for attend in model.attention.values()} == {KERNELS[kernel]}


def test_a_feature_that_is_asked_for_and_unknown_is_refused(tiny):
    with pytest.raises(StartupError, match="unknown feature 'magic': there are attention, compile"):
        applied(tiny, {"magic": {}})
    with pytest.raises(StartupError, match="backend 'magic' is unknown"):
        applied(tiny, {"attention": {"backend": "magic"}})


def test_a_family_without_attention_calls_is_served_unless_the_feature_is_asked_for(tiny, monkeypatch):
    monkeypatch.setattr(attention, "supports", lambda *_: "it has none")
    assert applied(tiny, {})[0] == {}
    with pytest.raises(StartupError, match="it has none"):
        applied(tiny, {"attention": {}})


def test_graphs_are_refused_where_launches_are_not_a_gpus_or_change(tiny):
    with pytest.raises(StartupError, match="'graphs' cannot be used here: a graph is of a CUDA device's launches"):
        applied(tiny, {"graphs": {}})
    plan = FAMILY.dit.plan
    alone, spread = frozenset({"graphs"}), frozenset({"graphs", "ulysses"})
    assert graphs.supports(plan, "cuda", alone) is None
    assert graphs.supports(plan, "cuda", spread | {"peers"}) is None
    assert "(ulysses) go by NCCL" in graphs.supports(plan, "cuda", spread)
    assert "(ring, tensor) go by NCCL" in graphs.supports(plan, "cuda", alone | {"ring", "tensor"})
    assert graphs.supports(plan, "cuda", alone | {"ring", "tensor", "peers"}) is None
    assert "2 or more places" in graphs.supports(plan, "cuda", alone | {"hsdp"})
    assert "each expert" in graphs.supports(load_family("hidream").dit.plan, "cuda", alone)


def test_a_graph_is_for_shapes_and_for_the_values_of_what_lies_on_the_cpu():
    def key(tokens: int, filling: list[int]) -> Any:
        meta = torch.empty(2, tokens, 8, device="meta")
        return graphs.key_of(QwenStreams(meta, meta, torch.tensor(filling), meta[:, 0], (meta[0], meta[0]), 4))

    assert key(5, [0, 2]) == key(5, [0, 2])
    assert len({key(5, [0, 2]), key(6, [0, 2]), key(5, [0, 3])}) == 3


def test_a_graph_is_for_the_lengths_of_what_is_spread_and_not_of_the_pieces_only(tiny, monkeypatch):
    monkeypatch.setitem(peer_memory, "planned ulysses", PeerMemory(lambda _size: None, 0, torch.device("cpu")))
    besides = []

    def wrap(run: BlockRun, beside: Beside) -> BlockRun:
        besides.append(beside)
        return run

    model = FAMILY.dit.load(open_source(str(tiny)), torch.device("cpu"), torch.float32)
    forward = Forward(model, FAMILY.dit, "auto", PlannedMesh(Degrees(ulysses=2), 0), wrap)
    pieces, lengths = set(), set()
    for text in (23, 24):
        whole = [torch.empty(1, tokens, 8, device="meta") for tokens in (16, text)]
        streams = QwenStreams(whole[0], whole[1], None, whole[0][:, 0], (whole[0], whole[1]), 16)
        pieces.add(graphs.key_of(forward._sequence.cut(streams)))
        lengths.add(besides[0]())
    assert len(pieces) == 1
    assert lengths == {(23, 16), (24, 16)}


def test_a_graph_of_a_ring_holds_the_orders_that_its_kernels_read(tiny):
    besides = []

    def wrap(run: BlockRun, beside: Beside) -> BlockRun:
        besides.append(beside)
        return run

    model = FAMILY.dit.load(open_source(str(tiny)), torch.device("cpu"), torch.float32)
    forward = Forward(model, FAMILY.dit, "auto", PlannedMesh(Degrees(ring=2), 0), wrap)

    def beside(text: int, filling: list[int]) -> Any:
        whole = [torch.empty(2, tokens, 8) for tokens in (16, text)]
        forward._sequence.cut(QwenStreams(whole[0], whole[1], torch.tensor(filling), whole[0][:, 0], tuple(whole), 16))
        return besides[0]()

    first = beside(23, [0, 2])
    assert first.ring_counts.tolist() == [[20, 18], [19, 19]]
    assert beside(23, [0, 2]) is first
    assert len({first, beside(24, [0, 2]), beside(23, [0, 3])}) == 3
