"""Two experts on a device with room for one: the same latents, one expert there at a time, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dit_svc.engine import DitEngine
from dit_svc.idle_experts import IdleExperts, Packs, _pin
from dit_svc.loading import open_engine
from services.config import EngineSection, StageConfig, parse
from services.errors import StartupError
from services.families import load_family
from services.weights import open_source
from tests.oracle.harness import CPU, Subject, difference, equal, make_folder, run
from tests.oracle.wan import ROWS

PART = load_family("wan").dit
[ROW] = [row for row in ROWS if row.variant == "t2v"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(ROW, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def test_three_interleaved_requests_get_the_same_latents(folder):
    subject = Subject(ROW, folder)
    resident, model = (PART.load(open_source(str(folder)), CPU, torch.float32) for _ in range(2))
    for module in resident.modules.values():
        for parameter in module.parameters():
            # Last bits on a CPU depend on where in memory a weight begins: not as in the mapped file here, as a copy.
            parameter.data = parameter.data.clone()
    idle = IdleExperts(model, CPU)
    wishes = {name: subject.params(wish) for name, wish in zip("abc", ROW.wishes, strict=True)}
    made = []
    for engine in (
        DitEngine(resident, PART, EngineSection(branches="serial", max_batch=1)),
        DitEngine(model, PART, EngineSection(branches="serial", max_batch=1), idle=idle),
    ):
        events = []
        for name, params in wishes.items():
            engine.admit(subject.job(name, params))
            events += engine.tick()
        made.append(run(engine, events))
    for name, params in wishes.items():
        assert equal(made[1][name], made[0][name]), name
        assert difference(made[1][name], subject.stock(params)) <= 1e-4, name
    assert engine.metrics()["dit_expert_swaps_total"] == idle.swaps >= 3


def test_one_expert_is_on_the_device_and_the_others_weights_are_the_hosts(folder):
    model = PART.load(open_source(str(folder)), CPU, torch.float32)
    idle = IdleExperts(model, CPU)
    kept = {name: {p.data_ptr() for p in module.parameters()} for name, module in model.modules.items()}
    for wanted in ("high_noise", "low_noise", "low_noise", "high_noise"):
        assert idle.enter(wanted) is model.modules[wanted]
        for name, module in model.modules.items():
            pointers = {p.data_ptr() for p in module.parameters()}
            assert pointers == kept[name] if name != wanted else not pointers & kept[name]
    assert idle.swaps == 3


def test_an_expert_that_did_not_fit_comes_whole_at_the_next_try(folder, monkeypatch):
    model = PART.load(open_source(str(folder)), CPU, torch.float32)
    expected = {key: tensor.clone() for key, tensor in model.modules["low_noise"].state_dict().items()}
    idle = IdleExperts(model, CPU)
    idle.enter("high_noise")
    to, copies = torch.Tensor.to, []

    def short(tensor, *args, **kwargs):
        copies.append(tensor)
        if len(copies) == 5:
            raise torch.OutOfMemoryError("no room")
        return to(tensor, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(torch.Tensor, "to", short)
        idle.enter("low_noise")
    loaded = idle.enter("low_noise").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


def config(folder: Path, **features: dict[str, object]) -> StageConfig:
    table = {
        "service": {"name": "dit", "port": 1},
        "model": {"name": "m", "source": str(folder), "device": "cpu"},
        "engine": {"offload_experts": True, "warmup": False},
        "features": features,
    }
    return parse(StageConfig, table)


def test_a_config_turns_it_on(folder):
    engine, _ = open_engine(config(folder))
    assert engine.metrics()["dit_expert_swaps_total"] == 0


def test_what_it_does_not_go_with_stops_the_start(folder, tmp_path):
    with pytest.raises(StartupError, match="CUDA graphs"):
        open_engine(config(folder, graphs={}))
    load_family("wan").tiny(tmp_path, "t2v_one_expert", 0)
    with pytest.raises(StartupError, match="this one has 1"):
        open_engine(config(tmp_path))


def test_weights_in_packs(folder, monkeypatch):
    monkeypatch.setattr("dit_svc.idle_experts.PACK_BYTES", 2**15)
    module = PART.load(open_source(str(folder)), CPU, torch.float32).modules["low_noise"]
    expected = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    weights = list(module.parameters())
    packs = Packs.of([weight.nbytes for weight in weights])
    assert max(weight.nbytes for weight in weights) > 2**15
    assert len(packs.sizes) > 3
    assert all(size & (size - 1) == 0 for size in packs.sizes)
    _pin(weights, pinned=False)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in module.state_dict().items())
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights}
    assert sorted(storages.values()) == sorted(packs.sizes)
