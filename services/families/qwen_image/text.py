"""Qwen-Image's text part: Qwen2.5-VL's last hidden states of the prompt, and of pictures, in the variant's template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from services.encoder_plans import QWEN_VL
from services.errors import InvalidRequest
from services.families.qwen_image.pictures import scaled
from services.families.qwen_image.recipes import Recipe, recipe_of
from services.family import Tensors, TextInput, TextPart
from services.hash_tokenizer import hash_tokens
from services.weights import ModelSource

MAX_TOKENS = 1024
IMAGE_MARK = "<|image_pad|>"


@dataclass(frozen=True, slots=True)
class TextModel:
    """Tokenizer (None for random weights), picture processor (None without pictures), encoder, and the recipe."""

    tokenizer: Any
    processor: Any
    encoder: Any
    recipe: Recipe


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> TextModel:
    """Reads `tokenizer/`, `processor/` and `text_encoder/` only."""
    encoder = source.load_transformers(
        Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, "text_encoder", device, dtype
    )
    recipe = recipe_of(source)
    processor = None
    if recipe.vision_area_px:
        # The Pillow version, whatever else is installed: the same picture gives the same patches everywhere.
        processor = Qwen2VLImageProcessorPil.from_dict(source.config("processor", "preprocessor_config.json"))
    return TextModel(_tokenizer(source), processor, encoder, recipe)


def sees(model: TextModel) -> tuple[str, ...]:
    """Pictures to edit, where the variant shows them to the encoder."""
    return ("image",) if model.processor is not None else ()


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
    """One "text" [T, D] for each prompt: hidden states after the template's prefix, without padding.

    Raises:
        InvalidRequest: a prompt with the image mark in it, or a picture that the model cannot take.
    """
    device = model.encoder.device
    vision = _vision(model, inputs)
    rows = _token_ids(model, inputs, vision)
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    if vision:
        # Without them the encoder would number the patches of a picture like words, not by row and column.
        vision["mm_token_type_ids"] = (ids == model.encoder.config.image_token_id).int()
    ids, mask = ids.to(device), mask.to(device)
    vision = {name: tensor.to(device) for name, tensor in vision.items()}
    # The inner model leaves out the vocabulary projection, whose result the pipeline throws away.
    hidden = model.encoder.model(input_ids=ids, attention_mask=mask, **vision).last_hidden_state
    return [
        {"text": hidden[row, model.recipe.template_tokens : length].clone()}
        for row, length in enumerate(lengths.tolist())
    ]


def _vision(model: TextModel, inputs: Sequence[TextInput]) -> Tensors:
    """All pictures, one after the other: `pixel_values` [patches, values] and `image_grid_thw` [pictures, 3]."""
    given = [picture for item in inputs for picture in item.images]
    if not given:
        return {}
    if model.processor is None:
        raise InvalidRequest("this model takes no input pictures", param="inputs")
    pictures = [scaled(picture, model.recipe.vision_area_px) for picture in given]
    features = model.processor(images=pictures, return_tensors="pt")
    return {name: features[name] for name in ("pixel_values", "image_grid_thw")}


def _token_ids(model: TextModel, inputs: Sequence[TextInput], vision: Tensors) -> list[list[int]]:
    grids = iter(vision["image_grid_thw"].tolist() if vision else ())
    rows = []
    for item in inputs:
        if item.images and IMAGE_MARK in item.text:
            raise InvalidRequest(f"the prompt contains {IMAGE_MARK}: remove it", param="prompt")
        marks = ""
        limit = model.recipe.template_tokens + MAX_TOKENS
        for number in range(1, len(item.images) + 1):
            frames, height, width = next(grids)
            patches = frames * height * width // model.processor.merge_size**2
            marks += model.recipe.picture.format(number).replace(IMAGE_MARK, IMAGE_MARK * patches)
            limit += patches
        rows.append(_tokenize(model, model.recipe.template.format(marks + item.text))[:limit])
    return rows


def _tokenize(model: TextModel, text: str) -> list[int]:
    if model.tokenizer is not None:
        ids: list[int] = model.tokenizer(text).input_ids
        return ids
    config = model.encoder.config
    return hash_tokens(text, config.get_text_config().vocab_size, {IMAGE_MARK: config.image_token_id})


TEXT = TextPart(load=load, encode=encode, plans={"text_encoder": QWEN_VL}, sees=sees)
