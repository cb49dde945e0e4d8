"""Qwen-Image's text part: Qwen2.5-VL's last hidden states of the prompt inside the family's template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from services.family import Tensors, TextInput, TextPart
from services.hash_tokenizer import hash_tokens
from services.weights import ModelSource

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_TOKENS = 34
MAX_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class TextModel:
    """Tokenizer (None for random weights) and encoder."""

    tokenizer: Any
    encoder: Any


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> TextModel:
    """Reads `tokenizer/` and `text_encoder/` only."""
    encoder = source.load_transformers(
        Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, "text_encoder", device, dtype
    )
    return TextModel(_tokenizer(source), encoder)


def _tokenizer(source: ModelSource) -> Any:
    if source.root is None:
        return None
    folder = source.folder("tokenizer")
    named = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class", "")
    if named.startswith("Qwen2"):
        from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

        return Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True)
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def encode(model: TextModel, inputs: Sequence[TextInput]) -> list[Tensors]:
    """One "text" [T, D] for each prompt: hidden states after the template's prefix, without padding."""
    ids, mask = _tokens(model, [TEMPLATE.format(item.text) for item in inputs])
    # The inner model leaves out the vocabulary projection, whose result the pipeline throws away.
    hidden = model.encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    return [
        {"text": hidden[row][mask[row].bool()][TEMPLATE_TOKENS:][:MAX_TOKENS].clone()} for row in range(len(inputs))
    ]


def _tokens(model: TextModel, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    device = model.encoder.device
    if model.tokenizer is not None:
        tokens = model.tokenizer(
            list(texts),
            max_length=MAX_TOKENS + TEMPLATE_TOKENS,
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(device), tokens.attention_mask.to(device)
    vocab_size = model.encoder.config.get_text_config().vocab_size
    rows = [hash_tokens(text, vocab_size)[: MAX_TOKENS + TEMPLATE_TOKENS] for text in texts]
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(longest, device=device) < lengths[:, None]).long()


TEXT = TextPart(load=load, encode=encode)
