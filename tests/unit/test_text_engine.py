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
