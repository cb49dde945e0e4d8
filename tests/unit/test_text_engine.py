"""The text encoder's engine: what fails, fails alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from services.errors import InvalidRequest, OutOfMemory
from services.family import Tensors, TextInput, TextPart
from services.request import GenerationParams, Limits, resolve
from text_encoder_svc.engine import TextEngine

PARAMS = resolve(GenerationParams(model="m", prompt="any", width=64, height=64, guidance=1.0), Limits(), seed=0)


def encode(_model: object, inputs: Sequence[TextInput]) -> list[Tensors]:
    texts = [item.text for item in inputs]
    if "large" in texts or len(texts) > 4:
        raise torch.OutOfMemoryError("too large")
    if "wrong" in texts:
        raise InvalidRequest("it cannot be encoded")
    return [{"text": torch.full((1,), float(len(text)))} for text in texts]


def run(prompts: Sequence[str]) -> dict[str, object]:
    part = TextPart(load=lambda *_: None, encode=encode, branches=lambda _params: ("positive",))
    engine = TextEngine(part, None, max_batch=8, cache_bytes=1024)
    for prompt in prompts:
        engine.submit(prompt, replace(PARAMS, prompt=prompt))
    return {done.request_id: done.error or done.tensors["positive/text"].item() for done in engine.tick()}


def test_a_prompt_that_does_not_fit_into_memory_fails_alone() -> None:
    seen = run(["good", "large", "wrong", "better"])
    assert (seen["good"], seen["better"]) == (4.0, 6.0)
    assert isinstance(seen["large"], OutOfMemory) and isinstance(seen["wrong"], InvalidRequest)


def test_prompts_that_do_not_fit_together_are_encoded_alone() -> None:
    prompts = ["a", "bb", "ccc", "dddd", "eeeee"]
    assert run(prompts) == {prompt: float(len(prompt)) for prompt in prompts}


class Counted:
    """A text engine whose encoder notes its batches; every embedding has `nbytes` bytes."""

    def __init__(self, max_batch: int = 8, cache_bytes: int = 1024, nbytes: int = 64) -> None:
        self.batches: list[list[str]] = []

        def encode(_model: object, inputs: Sequence[TextInput]) -> list[Tensors]:
            self.batches.append([item.text for item in inputs])
            return [{"text": torch.full((nbytes // 4,), float(len(item.text)))} for item in inputs]

        part = TextPart(load=lambda *_: None, encode=encode, branches=lambda _params: ("positive",))
        self.engine = TextEngine(part, None, max_batch=max_batch, cache_bytes=cache_bytes)

    def ask(self, *prompts: str) -> list[bool]:
        """Whether each came out of the cache."""
        for prompt in prompts:
            self.engine.submit(prompt, replace(PARAMS, prompt=prompt))
        cached = {}
        while self.engine.busy:
            cached |= {done.request_id: done.cached for done in self.engine.tick()}
        return [cached[prompt] for prompt in prompts]


def test_the_cache_holds_no_more_bytes_than_it_may_and_lets_the_least_recently_used_go() -> None:
    counted = Counted(cache_bytes=3 * 64)
    assert counted.ask("a", "bb", "ccc") == [False] * 3
    assert counted.engine.metrics()["text_cache_bytes"] == 3 * 64
    # "a" is used again, so "bb" is what goes for "dddd".
    assert counted.ask("a") == [True]
    assert counted.ask("dddd") == [False]
    assert counted.engine.metrics()["text_cache_bytes"] == 3 * 64
    assert counted.ask("a", "ccc", "dddd") == [True] * 3
    assert counted.ask("bb") == [False]
    for number in range(20):
        counted.ask(f"prompt {number}")
        assert counted.engine.metrics()["text_cache_bytes"] <= 3 * 64


def test_what_is_larger_than_the_cache_is_not_kept_and_costs_no_other() -> None:
    counted = Counted(cache_bytes=63)
    assert counted.ask("a") == counted.ask("a") == [False]
    assert counted.engine.metrics()["text_cache_bytes"] == 0
    assert counted.batches == [["a"], ["a"]]


def test_the_figures_tell_how_often_the_cache_had_it() -> None:
    counted = Counted()
    for prompts in (["a"], ["a"], ["a", "b"], ["b"]):
        counted.ask(*prompts)
    figures = counted.engine.metrics()
    assert (figures["text_cache_hits_total"], figures["text_cache_misses_total"]) == (3, 2)
    assert counted.batches == [["a"], ["b"]]


def test_no_more_prompts_than_a_batch_takes_share_a_forward() -> None:
    counted = Counted(max_batch=3)
    prompts = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg"]
    counted.ask(*prompts)
    assert [len(batch) for batch in counted.batches] == [3, 3, 1]
    assert [text for batch in counted.batches for text in batch] == prompts


def test_equal_prompts_in_one_batch_are_encoded_once() -> None:
    counted = Counted()
    for number in range(4):
        counted.engine.submit(str(number), replace(PARAMS, prompt="a red circle"))
    done = counted.engine.tick()
    assert len(done) == 4 and counted.batches == [["a red circle"]]
    assert all(torch.equal(one.tensors["positive/text"], done[0].tensors["positive/text"]) for one in done)


def test_an_aborted_request_is_not_encoded() -> None:
    counted = Counted()
    for prompt in ("a", "b"):
        counted.engine.submit(prompt, replace(PARAMS, prompt=prompt))
    counted.engine.abort("a")
    assert [done.request_id for done in counted.engine.tick()] == ["b"]
    assert counted.batches == [["b"]] and not counted.engine.busy
