"""FLUX's text part: T5's hidden states of every token, and CLIP's one vector for the whole prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from services.encoder_plans import T5
from services.errors import InvalidRequest
from services.families.flux.conditions import branches_of, text_tokens
from services.family import Tensors, TextInput, TextPart
from services.hash_tokenizer import hash_tokens
from services.weights import ModelSource

T5_END, T5_FILL = 1, 0


@dataclass(frozen=True, slots=True)
class Encoder:
    """Tokenizer (None for random weights), encoder, and how many tokens each of its texts has."""

    tokenizer: Any
    module: Any
    tokens: int


@dataclass(frozen=True, slots=True)
class TextModel:
    """Both encoders."""

    clip: Encoder
    t5: Encoder


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> TextModel:
    """Reads `tokenizer/`, `text_encoder/` (CLIP), `tokenizer_2/` and `text_encoder_2/` (T5) only."""
    clip: Any = source.load_transformers(CLIPTextModel, CLIPTextConfig, "text_encoder", device, dtype)
    t5 = source.load_transformers(T5EncoderModel, T5Config, "text_encoder_2", device, dtype)
    return TextModel(
        Encoder(_tokenizer(source, CLIPTokenizer, "tokenizer"), clip, clip.config.max_position_embeddings),
        Encoder(_tokenizer(source, T5Tokenizer, "tokenizer_2"), t5, text_tokens(source)),
    )


def _tokenizer(source: ModelSource, cls: Any, subfolder: str) -> Any:
    if source.root is None:
        return None
    return cls.from_pretrained(str(source.folder(subfolder)), local_files_only=True)


def encode(model: TextModel, inputs: Sequence[TextInput]) -> list[Tensors]:
    """For each prompt "text" [T, D], filling included, and "pooled" [D'] of CLIP.

    Longer prompts are cut: to 77 tokens for CLIP and T for T5. Neither encoder gets a mask, as in the stock pipeline.

    Raises:
        InvalidRequest: an input brings pictures.
    """
    if any(item.images for item in inputs):
        raise InvalidRequest("this model takes no input pictures", param="inputs")
    texts = [item.text for item in inputs]
    pooled = model.clip.module(_clip_ids(model.clip, texts)).pooler_output
    hidden = model.t5.module(_t5_ids(model.t5, texts)).last_hidden_state
    # Copies: a row that is cached must not hold its whole batch.
    return [{"text": row.clone(), "pooled": vector.clone()} for row, vector in zip(hidden, pooled, strict=True)]


def _clip_ids(encoder: Encoder, texts: Sequence[str]) -> torch.Tensor:
    # The vocabulary ends with its marks of start and end; the end's is also the filling.
    end = encoder.module.config.vocab_size - 1
    return _ids(encoder, texts, (end - 1,), end, end)


def _t5_ids(encoder: Encoder, texts: Sequence[str]) -> torch.Tensor:
    return _ids(encoder, texts, (), T5_END, T5_FILL)


def _ids(encoder: Encoder, texts: Sequence[str], start: Sequence[int], end: int, fill: int) -> torch.Tensor:
    """[B, tokens]; the marks are for texts without a tokenizer."""
    device = encoder.module.device
    if encoder.tokenizer is not None:
        options = {"padding": "max_length", "max_length": encoder.tokens, "truncation": True, "return_tensors": "pt"}
        ids: torch.Tensor = encoder.tokenizer(list(texts), **options).input_ids
        return ids.to(device)
    rows = []
    for text in texts:
        words = hash_tokens(text, encoder.module.config.vocab_size - 2)
        row = [*start, *words][: encoder.tokens - 1] + [end]
        rows.append(row + [fill] * (encoder.tokens - len(row)))
    return torch.tensor(rows, device=device)


TEXT = TextPart(load=load, encode=encode, branches=branches_of, plans={"text_encoder_2": T5})
