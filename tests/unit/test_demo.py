"""What the demo model's card says of its data, its judge and its files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from safetensors import safe_open
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from demo.captions import combinations, held_out_combination, held_out_form, training_pair
from demo.evaluate import CHECKPOINT, held_out, scorer_report
from demo.scenes import clear_relations
from demo.tokenizer import (
    EDIT_PREFIX,
    EDIT_PREFIX_TOKENS,
    IMAGE_PREFIX,
    IMAGE_PREFIX_TOKENS,
    assert_prefix,
)

MIB = 1024 * 1024


def test_the_scorer_agrees_with_true_scenes_and_not_with_shuffled_captions():
    found = scorer_report(held_out(120, seed=7))
    assert found["true_scenes"] == 1.0
    assert found["shuffled_captions"] < 0.2


@pytest.mark.parametrize(("prefix", "tokens"), [(IMAGE_PREFIX, 34), (EDIT_PREFIX, 64)])
def test_the_committed_tokenizer_makes_the_templates_what_the_pipelines_drop(prefix, tokens):
    assert tokens in (IMAGE_PREFIX_TOKENS, EDIT_PREFIX_TOKENS)
    tokenizer = Qwen2Tokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    assert_prefix(tokenizer, prefix, tokens)
    with pytest.raises(AssertionError, match=f"the pipeline drops {tokens - 1}"):
        assert_prefix(tokenizer, prefix, tokens - 1)


def test_training_shares_nothing_with_what_the_model_is_judged_by():
    rng = Random(3)
    trained = [training_pair(rng, 2) for _ in range(600)]
    judged = held_out(300)
    # Whatever is plain to see in a training scene, stated or not, against what held-out captions state.
    seen = {name for scene, _ in trained for name in combinations(scene, tuple(clear_relations(scene.objects)))}
    asked = {name for scene, _ in judged for name in combinations(scene, scene.relations)}
    assert len(seen) > 500 and len(asked) > 100
    assert not seen & asked
    assert not any(map(held_out_combination, seen)) and all(map(held_out_combination, asked))
    forms = {caption.form for _, captions in trained for caption in captions}
    asked_forms = {caption.form for _, caption in judged}
    assert forms and asked_forms and not forms & asked_forms
    assert all(map(held_out_form, asked_forms))
    texts = {caption.text for _, captions in trained for caption in captions}
    assert not texts & {caption.text for _, caption in judged}
    assert Counter(len(scene.objects) for scene, _ in judged) == {1: 100, 2: 100, 3: 100}


def test_the_weights_are_one_small_half_precision_file_a_component():
    files = sorted(CHECKPOINT.rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["text_encoder", "transformer", "vae"]
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) <= 15 * MIB and sum(sizes) <= 22_000_000
    for file in files:
        with safe_open(file, "pt") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"F16"}, file  # noqa: SIM118


def test_the_card_is_there():
    card = (Path(CHECKPOINT) / "README.md").read_text()
    assert all(word in card for word in ("data", "python -m demo.train", "seed", "licence", "python -m demo.evaluate"))
