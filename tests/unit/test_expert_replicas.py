"""Denoisers with one expert each: requests that go on from one to the other, what each reads, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dit_svc.engine import Checkpointed, DitEngine
from dit_svc.loading import open_engine
from dit_svc.rank import DitProgram
from services.config import EngineSection, StageConfig, parse
from services.errors import StartupError
from services.families import load_family
from services.tensors import Bundle
from services.weights import open_source
from tests.oracle.harness import CPU, Subject, equal, make_folder, run
from tests.oracle.wan import ROWS

PART = load_family("wan").dit
BY_VARIANT = {row.variant: row for row in ROWS}
FOLDERS = {"high_noise": "transformer", "low_noise": "transformer_2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {
        variant: make_folder(BY_VARIANT[variant], tmp_path_factory.mktemp(variant))
        for variant in ("t2v", "i2v", "t2v_one_expert")
    }


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def config(folder: Path, **engine: object) -> StageConfig:
    table = {
        "service": {"name": "dit", "port": 1},
        "model": {"name": "m", "source": str(folder), "device": "cpu"},
        "engine": {"branches": "serial", "max_batch": 1, "warmup": False, **engine},
    }
    return parse(StageConfig, table)


def holding(folder: Path, expert: str) -> DitEngine:
    return open_engine(config(folder, expert=expert))[0]


def handed_on(engine: DitEngine) -> dict[str, Checkpointed]:
    """What leaves an engine until it has nothing to do, by request."""
    events = []
    run(engine, events)
    return {event.request_id: event for event in events if isinstance(event, Checkpointed)}


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
def test_interleaved_requests_go_on_with_the_same_bits(folders, variant):
    row, folder = BY_VARIANT[variant], folders[variant]
    subject = Subject(row, folder)
    high, low = (holding(folder, expert) for expert in FOLDERS)
    wishes = {name: subject.params(wish) for name, wish in zip("abc", row.wishes, strict=True)}
    for name, params in wishes.items():
        high.admit(subject.job(name, params))
    left = handed_on(high)
    assert left.keys() == wishes.keys()
    assert high.metrics()["dit_live_tensors"] == high.metrics()["dit_requests"] == 0
    for name, event in left.items():
        assert (event.stopped, event.expert) == (True, "low_noise") and event.busy_s > 0
        low.admit(subject.job(name, wishes[name], Bundle(event.tensors, event.attributes)))
    made = run(low, [])
    for name, params in wishes.items():
        assert 0 < left[name].step < params.steps
        assert equal(made[name], subject.stock(params)), name
    made_steps = sum(engine.metrics()["dit_steps_total"] for engine in (high, low))
    assert made_steps == sum(params.steps for params in wishes.values())


@pytest.mark.parametrize(("ratio", "only"), [(0.0, "high_noise"), (1.5, "low_noise")])
def test_a_boundary_outside_the_steps_leaves_one_expert_all_of_them(folders, tmp_path, ratio, only):
    folder = tmp_path / "model"
    shutil.copytree(folders["t2v"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": ratio}))
    subject = Subject(BY_VARIANT["t2v"], folder)
    params = subject.params(BY_VARIANT["t2v"].wishes[0])
    for expert in FOLDERS:
        engine = holding(folder, expert)
        engine.admit(subject.job("a", params))
        events = []
        made = run(engine, events)
        if expert == only:
            assert equal(made["a"], subject.stock(params))
        else:
            [event] = events
            assert (event.step, event.expert, event.stopped) == (0, only, True)
            assert engine.metrics()["dit_steps_total"] == 0


@pytest.mark.parametrize("expert", FOLDERS)
def test_only_the_weights_of_the_held_expert_are_read(folders, tmp_path, expert):
    folder = tmp_path / "model"
    shutil.copytree(folders["t2v"], folder)
    other = next(name for name in FOLDERS if name != expert)
    shutil.rmtree(folder / FOLDERS[other])
    program = DitProgram(config(folder, expert=expert))
    facts = program.describe()
    assert (facts.expert, list(facts.experts)) == (expert, ["high_noise", "low_noise"])
    model = program._engine.model
    assert list(model.modules) == [expert]
    whole = PART.load(open_source(str(folders["t2v"])), CPU, torch.float32)
    assert all(
        torch.equal(weight, whole.modules[expert].state_dict()[name])
        for name, weight in model.modules[expert].state_dict().items()
    )


def test_each_has_a_queue_of_its_own(folders):
    ids = {DitProgram(config(folders["t2v"], expert=expert)).describe().component_id for expert in ("", *FOLDERS)}
    assert len(ids) == 3
    whole = DitProgram(config(folders["t2v"])).describe()
    assert (whole.expert, list(whole.experts)) == ("", [])


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
@pytest.mark.parametrize("expert", FOLDERS)
def test_a_warm_up_makes_steps_of_the_held_expert(folders, variant, expert):
    table = {"expert": expert, "warmup": True, "max_batch": 3, "branches": "rows"}
    engine, _ = open_engine(config(folders[variant], **table))
    # Batches of 1, 2 and 3 requests, two steps each, with guidance and without; then whole requests have still to come.
    assert engine.metrics()["dit_rows_total"] == (1 + 2 + 3) * 2 * (2 + 1)
    assert engine.metrics()["dit_requests"] == 0


def test_what_cannot_be_held_stops_the_start(folders):
    with pytest.raises(StartupError, match="no expert 'middle': it has high_noise, low_noise"):
        open_engine(config(folders["t2v"], expert="middle"))
    with pytest.raises(StartupError, match="no expert 'high_noise': it has 1 only"):
        open_engine(config(folders["t2v_one_expert"], expert="high_noise"))
    with pytest.raises(StartupError, match="none is idle"):
        open_engine(config(folders["t2v"], expert="high_noise", offload_experts=True))
    assert EngineSection().expert == ""
