"""The engine whatever the model: aborts, non-finite latents, wrong conditions, resolutions side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_svc.engine import DenoiseJob, Failed, Finished, Stepped
from dit_svc.forward import Forward, Pass, Predicted
from services.errors import InvalidRequest, NonFinite, OutOfMemory
from services.request import ResolvedParams
from tests.oracle.harness import Subject, difference, make_folder, run
from tests.oracle.qwen_image import ROWS

[ROW] = [row for row in ROWS if str(row) == "qwen_image-t2i"]


# Steps of three requests in one batch: when the second one meets its end, the first one makes its last step.
LANDING = {"ends": 2, "large": 4, "goes on": 4}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with torch.inference_mode():
        return Subject(ROW, make_folder(ROW, tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def asked(tiny: Subject, prompt: str, seed: int, **changes) -> ResolvedParams:
    return tiny.params(replace(ROW.wishes[0], prompt=prompt, seed=seed, **{"steps": 4} | changes))


def test_an_aborted_request_leaves_nothing_and_the_others_go_on(tiny):
    engine = tiny.engine()
    kept = asked(tiny, "a red circle", 1)
    engine.admit(tiny.job("kept", kept))
    engine.admit(tiny.job("gone", asked(tiny, "a cat", 2)))
    events = engine.tick()
    assert engine.metrics()["dit_live_tensors"] > 3
    engine.abort("gone")
    results = run(engine, events)
    assert list(results) == ["kept"]
    assert difference(results["kept"], tiny.stock(kept)) <= 1e-4
    assert engine.metrics()["dit_live_tensors"] == 0
    assert not [event for event in events if event.request_id == "gone" and event.step > 1]


def test_a_non_finite_latent_fails_its_request_with_the_step(tiny):
    engine = tiny.engine()
    job = tiny.job("bad", asked(tiny, "a cat", 2))
    job.conditions["positive/text"][0, 0, 0] = float("nan")
    engine.admit(job)
    good = asked(tiny, "a dog", 4)
    engine.admit(tiny.job("good", good))
    events: list = []
    results = run(engine, events)
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert failed.request_id == "bad"
    assert isinstance(failed.error, NonFinite)
    assert "step 1 of 4" in failed.error.message
    assert difference(results["good"], tiny.stock(good)) <= 1e-4


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("positive/text", torch.zeros(1, 5, 7)),
        ("positive/text", torch.zeros(2, 5, 48)),
        ("positive/text", torch.zeros(1, 5, 48, dtype=torch.int64)),
        ("positive/other", torch.zeros(1, 5, 48)),
    ],
)
def test_wrong_conditions_are_refused(tiny, name, tensor):
    params = asked(tiny, "a cat", 2, guidance=1.0)
    engine = tiny.engine()
    with pytest.raises(InvalidRequest):
        engine.admit(DenoiseJob("x", params, {name: tensor}))
    assert not engine.busy


@pytest.mark.parametrize("branches", ["serial", "rows"])
def test_out_of_memory_fails_the_newest_and_nothing_else(tiny, branches, monkeypatch):
    engine = tiny.engine(branches=branches)
    kept = asked(tiny, "a red circle", 1)
    engine.admit(tiny.job("kept", kept))
    engine.admit(tiny.job("large", asked(tiny, "a dog", 2)))
    run_blocks, calls = engine._forward._work, []

    def short_of_memory():
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return run_blocks()

    monkeypatch.setattr(engine._forward, "_work", short_of_memory)
    events: list = []
    results = run(engine, events)
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert (failed.request_id, type(failed.error)) == ("large", OutOfMemory)
    assert difference(results["kept"], tiny.stock(kept)) <= 1e-4
    for name in ("after", "and after"):
        engine.admit(tiny.job(name, kept))
    after = run(engine, [])
    assert difference(after["after"], tiny.stock(kept)) <= 1e-4
    assert difference(after["and after"], tiny.stock(kept)) <= 1e-4


@pytest.mark.parametrize("function", ["combine", "advance"])
def test_out_of_memory_while_a_batch_lands_costs_the_request_that_it_met(tiny, function, monkeypatch):
    engine = tiny.engine()
    wishes = {name: asked(tiny, name, seed, steps=steps) for seed, (name, steps) in enumerate(LANDING.items())}
    for name, params in wishes.items():
        engine.admit(tiny.job(name, params))
    made = getattr(engine._part, function)

    def short_of_memory(model, state, *rest):
        if state.request_id == "large" and state.step == 1:
            raise torch.OutOfMemoryError("no memory")
        return made(model, state, *rest)

    monkeypatch.setattr(engine, "_part", replace(engine._part, **{function: short_of_memory}))
    events: list = []
    results = run(engine, events)
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert (failed.request_id, type(failed.error)) == ("large", OutOfMemory)
    assert set(results) == {"ends", "goes on"}
    for name, latents in results.items():
        assert difference(latents, tiny.stock(wishes[name])) <= 1e-4
        steps = [event.step for event in events if isinstance(event, Stepped) and event.request_id == name]
        assert steps == list(range(1, wishes[name].steps + 1))
    assert engine.metrics()["dit_live_tensors"] == 0


def test_out_of_memory_in_what_follows_a_step_costs_one_request(tiny, monkeypatch):
    engine = tiny.engine()
    kept = asked(tiny, "a red circle", 1)
    for name in ("large", "kept"):
        engine.admit(tiny.job(name, kept))
    finish = engine._part.finish

    def short_of_memory(model, state):
        if state.request_id == "large":
            raise torch.OutOfMemoryError("no memory")
        return finish(model, state)

    monkeypatch.setattr(engine, "_part", replace(engine._part, finish=short_of_memory))
    events: list = []
    results = run(engine, events)
    assert [event.request_id for event in events if isinstance(event, Failed)] == ["large"]
    assert difference(results["kept"], tiny.stock(kept)) <= 1e-4
    assert not engine.busy


def test_requests_of_one_shape_take_turns_when_they_are_more_than_a_batch(tiny):
    engine, steps = tiny.engine(max_batch=2), dict.fromkeys("abcde", 0)
    for seed, name in enumerate(steps):
        engine.admit(tiny.job(name, asked(tiny, "a cat", seed, steps=8)))
    for _ in range(10):
        for event in engine.tick():
            if isinstance(event, Stepped):
                steps[event.request_id] = event.step
                assert event.batch == 2
    assert list(steps.values()) == [4] * 5


def test_out_of_memory_fails_the_newest_after_turns_too(tiny, monkeypatch):
    engine = tiny.engine(max_batch=2)
    for seed, name in enumerate(("first", "second", "newest")):
        engine.admit(tiny.job(name, asked(tiny, "a cat", seed)))
    # In the second tick, the newest is in front of the batch.
    engine.tick()
    run_blocks, calls = engine._forward._work, []

    def short_of_memory():
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        return run_blocks()

    monkeypatch.setattr(engine._forward, "_work", short_of_memory)
    events: list = []
    assert set(run(engine, events)) == {"first", "second"}
    assert [event.request_id for event in events if isinstance(event, Failed)] == ["newest"]


def test_a_bug_in_a_forward_leaves_the_engine_whole(tiny, monkeypatch):
    engine = tiny.engine()
    params = asked(tiny, "a red circle", 1)
    engine.admit(tiny.job("broken", params))
    with monkeypatch.context() as patch:
        patch.setattr(engine._forward, "_work", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.tick()
    engine.abort("broken")
    engine.admit(tiny.job("next", params))
    assert difference(run(engine, [])["next"], tiny.stock(params)) <= 1e-4
    assert not engine.busy


def test_resolutions_interleave(tiny):
    engine, events = tiny.engine(max_batch=4), []
    for index in range(3):
        engine.admit(tiny.job(f"small-{index}", asked(tiny, "a cat", index, steps=6)))
    engine.admit(tiny.job("wide", asked(tiny, "a dog", 9, steps=6, width=128)))
    run(engine, events)
    finished = [event.request_id for event in events if isinstance(event, Finished)]
    first_wide = next(i for i, e in enumerate(events) if e.request_id == "wide")
    last_small = max(i for i, e in enumerate(events) if e.request_id.startswith("small") and isinstance(e, Stepped))
    assert first_wide < last_small
    assert len(finished) == 4


class Later:
    """A forward as behind a pipeline of two ranks: predictions of a pass come with the next beat."""

    depth = 2

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._leaving: list[Predicted] = []
        self.passes = forward.passes

    @property
    def empty(self) -> bool:
        return not self._leaving

    def beat(self, entering: Pass | None) -> list[Predicted]:
        made = self._forward.beat(entering) if entering else []
        leaving, self._leaving = self._leaving, made
        return leaving


def test_behind_a_pipeline_a_large_request_gets_its_share_and_no_more(tiny, monkeypatch):
    engine = tiny.engine(max_batch=4)
    monkeypatch.setattr(engine, "_forward", Later(engine._forward))
    # Nobody sees how long either takes here; a step of the large one costs as 16 of a small one.
    monkeypatch.setattr(engine, "_cost", lambda running: 16.0 if running.state.request_id == "large" else 1.0)
    engine.admit(tiny.job("large", asked(tiny, "a dog", 9, steps=40, width=128)))
    for index in range(4):
        engine.admit(tiny.job(f"small-{index}", asked(tiny, "a cat", index, steps=40)))
    steps: dict[str, int] = {}
    while steps.get("small-0", 0) < 32:
        steps |= {event.request_id: event.step for event in engine.tick() if isinstance(event, Stepped)}
    assert steps["large"] in (2, 3), steps


def test_with_a_device_of_its_own_a_step_is_told_of_while_the_next_one_runs(tiny):
    params = asked(tiny, "a red circle", 1)
    engine = tiny.engine(branches="serial", max_batch=1)
    # As on a GPU, where a launched step runs by itself.
    engine._asynchronous = True
    engine.admit(tiny.job("a", params))
    told: list[tuple[int, int]] = []
    finished = []
    while engine.busy:
        events = engine.begin()
        made = int(engine._requests["a"].state.step) if "a" in engine._requests else params.steps
        told += [(event.step, made) for event in events if isinstance(event, Stepped)]
        finished += [event for event in events if isinstance(event, Finished)]
        engine.complete()
    assert told == [(1, 2), (2, 3), (3, 4), (4, 4)]
    [result] = finished
    assert torch.equal(result.tensors["latents"], tiny.stock(params)["latents"])
