"""HiDream's text part: two CLIP encoders for the pooled text, T5, and hidden states of Llama's layers.

All four read the same prompt, filled up or cut to 128 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel

from services.encoder_plans import LLAMA, T5
from services.families.hidream.conditions import TEXT_TOKENS, llama_layers
from services.family import Tensors, TextInput, TextPart
from services.hash_tokenizer import hash_tokens
from services.weights import ModelSource


@dataclass(frozen=True, slots=True)
class Encoder:
    """An encoder with its tokenizer, None for random weights, whose texts get `start`, `end` and `filling` as ids."""

    model: Any
    tokenizer: Any
    start: tuple[int, ...]
    end: tuple[int, ...]
    filling: int

    def tokens(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask [B, 128] on the encoder's device."""
        device = self.model.device
        if self.tokenizer is not None:
            tokens = self.tokenizer(
                list(texts), padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
            )
            return tokens.input_ids.to(device), tokens.attention_mask.to(device)
        vocab_size, room = self.model.config.vocab_size - 2, TEXT_TOKENS - len(self.start) - len(self.end)
        rows = [[*self.start, *hash_tokens(text, vocab_size)[:room], *self.end] for text in texts]
        ids = torch.tensor([row + [self.filling] * (TEXT_TOKENS - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return ids, (torch.arange(TEXT_TOKENS, device=device) < lengths[:, None]).long()


@dataclass(frozen=True, slots=True)
class TextModel:
    """The four encoders, and the layers of Llama that the denoiser uses."""

    clips: tuple[Encoder, Encoder]
    t5: Encoder
    llama: Encoder
    layers: list[int]


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> TextModel:
    """Reads the tokenizers and text encoders, and which layers the transformer's config names."""

    def clip(end: str) -> Encoder:
        model: Any = source.load_transformers(
            CLIPTextModelWithProjection, CLIPTextConfig, f"text_encoder{end}", device, dtype
        )
        last = model.config.vocab_size - 1
        return Encoder(model, _tokenizer(source, f"tokenizer{end}"), (last - 1,), (last,), last)

    t5 = source.load_transformers(T5EncoderModel, T5Config, "text_encoder_3", device, dtype)
    # Without its projection to the vocabulary, a gigabyte that nothing here needs.
    llama: Any = source.load_transformers(LlamaModel, LlamaConfig, "text_encoder_4", device, dtype)
    tokenizer = _tokenizer(source, "tokenizer_4")
    if tokenizer is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return TextModel(
        clips=(clip(""), clip("_2")),
        t5=Encoder(t5, _tokenizer(source, "tokenizer_3"), (), (1,), 0),
        llama=Encoder(llama, tokenizer, (llama.config.bos_token_id,), (), 0),
        layers=llama_layers(source.config("transformer")),
    )


def _tokenizer(source: ModelSource, subfolder: str) -> Any:
    if source.root is None:
        return None
    folder = source.folder(subfolder)
    named = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class", "")
    if named.startswith("CLIP"):
        from transformers.models.clip.tokenization_clip import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    if named.startswith("T5"):
        from transformers.models.t5.tokenization_t5 import T5Tokenizer

        return T5Tokenizer.from_pretrained(str(folder), local_files_only=True)
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def encode(model: TextModel, inputs: Sequence[TextInput]) -> list[Tensors]:
    """For each prompt "pooled" [width], "t5" [128, width], and "llama/K" [128, width] of each layer K in use.

    A layer has 1 MiB at full size, and the published models use all 32. Filling is not zero, so all of it travels.
    """
    texts = [item.text for item in inputs]
    # CLIP sees its filling as text: it gets no mask, as the model was trained.
    pooled = torch.cat([clip.model(clip.tokens(texts)[0]).text_embeds for clip in model.clips], dim=-1)
    t5 = model.t5.model(*model.t5.tokens(texts)).last_hidden_state
    ids, mask = model.llama.tokens(texts)
    hidden = model.llama.model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    layers = {f"llama/{layer}": hidden[layer + 1] for layer in model.layers}
    return [
        {name: tensor[row].clone() for name, tensor in {"pooled": pooled, "t5": t5, **layers}.items()}
        for row in range(len(texts))
    ]


TEXT = TextPart(load=load, encode=encode, plans={"text_encoder_3": T5, "text_encoder_4": LLAMA})
