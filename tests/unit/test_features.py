"""Which features are on: attention by capability always, the rest where a config asks for them."""

from __future__ import annotations

import gc
import json
import weakref
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
    alone, axes = frozenset({"graphs"}), ("ring", "tensor", "ulysses")
    assert graphs.supports(plan, "cuda", alone) is None
    assert graphs.supports(plan, "cuda", alone | {"cfg", "pipeline"}) is None
    for axis in axes:
        assert f"the ranks of {axis} send by NCCL" in graphs.supports(plan, "cuda", alone | {axis})
    spread = alone | {*axes, *(f"{axis} by peers" for axis in axes)}
    assert graphs.supports(plan, "cuda", spread) is None
    assert "the ranks of tensor send" in graphs.supports(plan, "cuda", spread - {"tensor by peers"})
    assert "2 or more places" in graphs.supports(plan, "cuda", alone | {"hsdp"})
    assert "each expert" in graphs.supports(load_family("hidream").dit.plan, "cuda", alone)


def test_nothing_is_collected_while_a_graph_is_made():
    """A graph that goes meanwhile, with garbage that refers to itself, makes CUDA refuse all that follows."""

    class Garbage:
        def __init__(self) -> None:
            self.itself = self

    before = weakref.ref(Garbage())
    with pytest.raises(torch.OutOfMemoryError), graphs.nothing_collected():
        assert before() is None
        meanwhile = weakref.ref(Garbage())
        kept = [[] for _ in range(10 * gc.get_threshold()[0])]
        assert meanwhile() is not None
        raise torch.OutOfMemoryError
    assert gc.isenabled() and kept
    with graphs.nothing_collected():
        assert meanwhile() is None


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
    assert lengths == {((23, 16),), ((24, 16),)}


@pytest.mark.parametrize(
    ("degrees", "connected", "by_peers"),
    [
        (Degrees(ulysses=2), ["ulysses"], {"ulysses"}),
        (Degrees(ring=2, ulysses=2), ["ring"], {"ring"}),
        (Degrees(ring=2, ulysses=2), ["ring", "ulysses"], {"ring", "ulysses"}),
        (Degrees(tensor=2), [], set()),
        (Degrees(tensor=2), ["tensor"], {"tensor"}),
        # Three ranks sum by NCCL, unless each sums its piece of the tokens.
        (Degrees(tensor=3), ["tensor"], set()),
        (Degrees(tensor=3, tensor_sequence=True), ["tensor"], {"tensor"}),
    ],
)
def test_axes_that_send_by_peers_memory_alone(degrees, connected, by_peers, monkeypatch):
    for axis in connected:
        monkeypatch.setitem(peer_memory, f"planned {axis}", PeerMemory(lambda _size: None, 0, torch.device("cpu")))
    active = PlannedMesh(degrees, 0).active
    axes = {axis for axis in ("ring", "ulysses", "tensor") if degrees.size(axis) > 1}
    assert active == axes | {f"{axis} by peers" for axis in by_peers}
