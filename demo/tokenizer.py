"""Builds the demo tokenizer: Qwen2's byte-level BPE with a vocabulary learned from the captions.

Called once when a checkpoint is created, and by the tests. Words of the captions and of the family's
prompt templates become single tokens, so the text-to-image template is its 34-token prefix exactly, as
with the full vocabulary; any other text falls back to bytes.
"""

import json
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

from demo.captions import caption
from demo.scenes import sample_scene

IMAGE_PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
IMAGE_PREFIX_TOKENS = 34
"""What QwenImagePipeline drops after encoding (its prompt_template_encode_start_idx)."""
EDIT_PREFIX = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new "
    "image that meets the user's requirements while maintaining consistency with the original input where "
    "appropriate.<|im_end|>\n<|im_start|>user\n"
)
EDIT_PREFIX_TOKENS = 64
"""What QwenImageEditPipeline drops."""
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2.5-VL's, in its order; they follow the learned vocabulary as they do there."""


def build_tokenizer(num_captions: int = 20_000) -> Qwen2Tokenizer:
    """Learn the vocabulary from captions of both splits and from the templates; the result is always the same.

    Raises: AssertionError when a template is not the prefix its pipeline drops.
    """
    rng = Random(0)
    texts = [caption(rng, sample_scene(rng, 1 + i % 3)).text for i in range(num_captions)]
    templates = [IMAGE_PREFIX + SUFFIX, EDIT_PREFIX + "Picture 1: " + SUFFIX]
    for token in SPECIAL_TOKENS:
        templates = [text.replace(token, "") for text in templates]
    vocabulary, merges = _learn(texts + templates)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="right",
        model_max_length=131_072,
    )
    assert_prefix(tokenizer, IMAGE_PREFIX, IMAGE_PREFIX_TOKENS)
    assert_prefix(tokenizer, EDIT_PREFIX, EDIT_PREFIX_TOKENS)
    return tokenizer


def assert_prefix(tokenizer: Qwen2Tokenizer, prefix: str, num_tokens: int) -> None:
    """Check that a template's prefix has the length its pipeline drops, also with a prompt behind it."""
    ids = tokenizer(prefix)["input_ids"]
    assert len(ids) == num_tokens, f"prefix is {len(ids)} tokens, the pipeline drops {num_tokens}"
    followed = tokenizer(prefix + "a red circle" + SUFFIX)["input_ids"]
    assert followed[:num_tokens] == ids, "the prompt changes the tokens of the prefix"


def _learn(texts: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE merges until every word of the texts is one token, special tokens last."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    learner.decoder = decoders.ByteLevel()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=8_000, min_frequency=1, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    vocabulary: dict[str, int] = dict(model["vocab"])
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    return vocabulary, [(left, right) for left, right in model["merges"]]
