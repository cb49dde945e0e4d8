"""Every family and variant against its stock pipeline: alone, interleaved, resumed, batched, in bf16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_svc.engine import Checkpointed, Stepped
from services.family import Row
from services.tensors import Bundle
from tests.oracle import ROWS
from tests.oracle.harness import OracleRow, Subject, difference, equal, make_folder, relative, run

ALONE = {"branches": "serial", "max_batch": 1}


@pytest.fixture(scope="module", params=ROWS, ids=str)
def row(request) -> OracleRow:
    return request.param


@pytest.fixture(scope="module")
def folder(row, tmp_path_factory):
    return make_folder(row, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def subject(row, folder):
    with torch.inference_mode():
        return Subject(row, folder)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("guidance", ["on", "off"])
def test_alone_equals_the_stock_pipeline_bit_for_bit(row, subject, guidance):
    wish = row.wishes[0] if guidance == "on" else replace(row.wishes[0], guidance=1.0)
    params = subject.params(wish)
    assert (params.guidance > 1) == (guidance == "on")
    engine = subject.engine(**ALONE)
    engine.admit(subject.job("a", params))
    assert equal(run(engine, [])["a"], subject.stock(params))


def test_three_interleaved_equal_the_stock_pipeline_bit_for_bit(row, subject):
    wishes = {name: subject.params(wish) for name, wish in zip("abc", row.wishes, strict=True)}
    engine, events = subject.engine(**ALONE), []
    for name, params in wishes.items():
        engine.admit(subject.job(name, params))
        events += engine.tick()
    results = run(engine, events)
    for name, params in wishes.items():
        assert equal(results[name], subject.stock(params)), name
    order = [event.request_id for event in events if isinstance(event, Stepped)]
    assert order != sorted(order), "the requests ran one after the other"


def test_resumed_from_a_checkpoint_equals_the_stock_pipeline_bit_for_bit(row, subject):
    params = subject.params(row.wishes[0])
    engine, events = subject.engine(**ALONE), []
    engine.admit(subject.job("a", params))
    for _ in range(params.steps // 2):
        events += engine.tick()
    engine.request_checkpoint("a", stop=True)
    events += engine.tick()
    [checkpoint] = [event for event in events if isinstance(event, Checkpointed)]
    assert checkpoint.step == params.steps // 2
    assert not engine.busy
    other = subject.engine(**ALONE)
    other.admit(subject.job("a", params, Bundle(dict(checkpoint.tensors), checkpoint.attributes)))
    assert equal(run(other, [])["a"], subject.stock(params))


def test_batched_at_different_steps_and_lengths_stays_within_tolerance(row, subject):
    wishes = {name: subject.params(wish) for name, wish in zip("abc", row.batch, strict=True)}
    engine, events = subject.engine(branches="rows", max_batch=8), []
    for name, params in wishes.items():
        engine.admit(subject.job(name, params))
        events += engine.tick()
    results = run(engine, events)
    for name, params in wishes.items():
        assert difference(results[name], subject.stock(params)) <= 1e-4, name
    assert max(event.batch for event in events if isinstance(event, Stepped)) == row.shared


def test_one_forward_of_a_batch_is_within_tolerance_of_each_row_alone(row, subject):
    part, model = subject.family.dit, subject.dit
    states = []
    for index, wish in enumerate(row.batch):
        params = subject.params(wish)
        state = part.prepare(model, str(index), params, subject.job(str(index), params).conditions)
        state.step = index
        states.append(state)
    expert = part.expert(model, states[0])
    rows = [
        Row(state, branch)
        for state in states
        if part.expert(model, state) == expert
        for branch in part.branches(model, state)
    ]
    assert len({row.state.request_id for row in rows}) > 1

    def forward(rows: list[Row]) -> torch.Tensor:
        module = model.modules[expert]
        streams = part.embed(module, part.collate(model, rows))
        for block in part.blocks(module):
            streams = block.run(streams)
        return part.head(module, streams)

    for together, one in zip(torch.split(forward(rows), 1), rows, strict=True):
        assert relative(together, forward([one])) <= 1e-5, (one.state.request_id, one.branch)


def test_bf16_alone_against_the_stock_pipeline_in_bf16(row, folder):
    subject = Subject(row, folder, torch.bfloat16)
    params = subject.params(row.wishes[0])
    engine = subject.engine(**ALONE)
    engine.admit(subject.job("a", params))
    ours, theirs = run(engine, [])["a"], subject.stock(params)
    assert {tensor.dtype for tensor in ours.values()} == {tensor.dtype for tensor in theirs.values()}
    if row.bf16_tolerance:
        assert 0 < difference(ours, theirs) <= row.bf16_tolerance, "0 here: the row's tolerance can go"
    else:
        assert equal(ours, theirs)
