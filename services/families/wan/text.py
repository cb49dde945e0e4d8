"""Wan's text part: UMT5's last hidden states of the cleaned prompt; with Wan 2.1, what CLIP sees in input pictures."""

from __future__ import annotations

import html
import importlib
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from services.encoder_plans import T5
from services.errors import InvalidRequest
from services.family import Frames, Tensors, TextInput, TextPart
from services.hash_tokenizer import hash_tokens
from services.weights import ModelSource

# As in the stock pipeline: text is repaired only where this package is installed.
FTFY: Any = importlib.import_module("ftfy") if importlib.util.find_spec("ftfy") else None

MAX_TOKENS = 512
END_OF_TEXT = 1


@dataclass(frozen=True, slots=True)
class TextModel:
    """Tokenizer (None for random weights) and encoder; of models with an image encoder, it and its processor."""

    tokenizer: Any
    encoder: Any
    picture_processor: Any = None
    picture_encoder: Any = None


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> TextModel:
    """Reads `tokenizer/`, `text_encoder/` and, where they are, `image_processor/` and `image_encoder/` only."""
    encoder = source.load_transformers(UMT5EncoderModel, UMT5Config, "text_encoder", device, dtype)
    if not source.has("image_encoder"):
        return TextModel(_tokenizer(source), encoder)
    # The Pillow version, whatever else is installed: the same picture gives the same pixels everywhere.
    processor = CLIPImageProcessorPil.from_dict(source.config("image_processor", "preprocessor_config.json"))
    seeing = source.load_transformers(CLIPVisionModel, CLIPVisionConfig, "image_encoder", device, dtype)
    return TextModel(_tokenizer(source), encoder, processor, seeing)


def sees(model: TextModel) -> tuple[str, ...]:
    """First and last picture of the clip, where there is an image encoder."""
    return () if model.picture_encoder is None else ("image", "last_image")


def _tokenizer(source: ModelSource) -> Any:
    if source.root is None:
        return None
    folder = source.folder("tokenizer")
    named = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class", "")
    if named.startswith("T5"):
        from transformers.models.t5.tokenization_t5 import T5Tokenizer

        return T5Tokenizer.from_pretrained(str(folder), local_files_only=True)
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def encode(model: TextModel, inputs: Sequence[TextInput]) -> list[Tensors]:
    """One "text" [T, D] for each prompt, T <= 512, without padding; with an image encoder, "pictures" [T', D'] too.

    The encoder runs on 512 tokens whatever the prompt's length: another length would cost the last bits. The denoiser
    sees zeros after T; it has no mask, so they are part of what a prompt means.
    """
    ids, mask = _tokens(model, [clean(item.text) for item in inputs])
    hidden = model.encoder(ids, mask).last_hidden_state
    encoded = [{"text": rows[:length].clone()} for rows, length in zip(hidden, mask.sum(dim=1).tolist(), strict=True)]
    if model.picture_encoder is not None:
        # All branches of a request have the same pictures, which are looked at once.
        given = {id(item.images): item.images for item in inputs}
        seen = {key: _look(model, images) for key, images in given.items()}
        for item, tensors in zip(inputs, encoded, strict=True):
            tensors["pictures"] = seen[id(item.images)]
    return encoded


def _look(model: TextModel, images: Sequence[Frames]) -> torch.Tensor:
    """What enters the encoder's last layer, one picture after the other: [T', D']."""
    if not images:
        raise InvalidRequest("this model needs an input picture, and there is none", param="inputs")
    pictures = [Image.fromarray(image[0]) for image in images]
    pixels = model.picture_processor(images=pictures, return_tensors="pt").pixel_values
    encoder = model.picture_encoder
    states = encoder(pixels.to(encoder.device, encoder.dtype), output_hidden_states=True).hidden_states
    tokens: torch.Tensor = states[-2].flatten(0, 1)
    return tokens


def clean(text: str) -> str:
    """Entities resolved (twice, for those that were escaped twice), runs of white space as one space."""
    if FTFY is not None:
        text = FTFY.fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text)).strip()).strip()


def _tokens(model: TextModel, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    device = model.encoder.device
    if model.tokenizer is not None:
        tokens = model.tokenizer(
            list(texts), max_length=MAX_TOKENS, padding="max_length", truncation=True, return_tensors="pt"
        )
        return tokens.input_ids.to(device), tokens.attention_mask.to(device)
    vocab_size = model.encoder.config.vocab_size
    rows = [[*hash_tokens(text, vocab_size)[: MAX_TOKENS - 1], END_OF_TEXT] for text in texts]
    ids = torch.tensor([row + [0] * (MAX_TOKENS - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(MAX_TOKENS, device=device) < lengths[:, None]).long()


TEXT = TextPart(load=load, encode=encode, plans={"text_encoder": T5}, sees=sees)
