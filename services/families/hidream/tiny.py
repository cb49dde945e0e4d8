"""A random HiDream of a few hundred thousand weights, for tests; the variants differ in their schedulers."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_hidream_image import HiDreamImageTransformer2DModel
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from services.families.hidream.conditions import TEXT_TOKENS
from services.families.hidream.presets import PIPELINE, PRESETS, VARIANTS

T5_WIDTH, LLAMA_WIDTH, CLIP_WIDTH = 40, 48, 24
LETTERS = string.ascii_lowercase + string.digits + ",.'-"


def tiny(folder: Path, variant: str, seed: int) -> None:
    """Writes the model in the diffusers format.

    Raises:
        ValueError: unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: there are {', '.join(VARIANTS)}")
    preset = PRESETS[f"hidream-i1-{variant}"]
    torch.manual_seed(seed)
    for end in ("", "_2"):
        _save_clip(folder, end)
    _save_t5(folder)
    _save_llama(folder)
    HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=6,
        caption_channels=[T5_WIDTH, LLAMA_WIDTH],
        text_emb_dim=2 * CLIP_WIDTH,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(28, 28),
        llama_layers=[0, 1, 3, 3],
    ).save_pretrained(folder / "transformer")
    narrow = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
    AutoencoderKL.from_config(preset["vae"] | narrow).save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", preset["scheduler"])
    index: dict[str, Any] = {
        "_class_name": PIPELINE,
        "_diffusers_version": "0.42.1",
        **({"fast": True} if variant == "fast" else {}),
        "scheduler": ["diffusers", preset["scheduler"]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "text_encoder_4": ["transformers", "LlamaForCausalLM"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5Tokenizer"],
        "tokenizer_4": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "HiDreamImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _save_clip(folder: Path, end: str) -> None:
    """Letters are tokens, at the end of a word or inside it; the marks come last, as in the model's own vocabulary."""
    tokens = [letter + ending for ending in ("", "</w>") for letter in LETTERS]
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder / f"tokenizer{end}")
    CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            projection_dim=CLIP_WIDTH,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
    ).save_pretrained(folder / f"text_encoder{end}")


def _save_t5(folder: Path) -> None:
    """A token a letter, with the space before it or alone."""
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -4.0)]
    letters = [(space + letter, -8.0) for space in ("", "▁") for letter in LETTERS]
    T5Tokenizer(vocab=marks + letters, extra_ids=0).save_pretrained(folder / "tokenizer_3")
    T5EncoderModel(
        T5Config(
            vocab_size=96,
            d_model=T5_WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            tie_word_embeddings=False,
        )
    ).save_pretrained(folder / "text_encoder_3")


def _save_llama(folder: Path) -> None:
    """Bytes are tokens, after a mark where text begins."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    words = [begin, end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end).save_pretrained(
        folder / "tokenizer_4"
    )
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=LLAMA_WIDTH,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).save_pretrained(folder / "text_encoder_4")
