"""Random FLUX models of a few hundred thousand weights, for tests: dev and schnell."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from services.families.flux.presets import PIPELINE, SCHEDULERS, VAE, VARIANTS

TEXT_WIDTH, POOLED_WIDTH = 40, 24
LETTERS = string.ascii_lowercase + string.digits + ",.'-"


def tiny(folder: Path, variant: str, seed: int) -> None:
    """Writes the model in the diffusers format.

    Raises:
        ValueError: unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: there are {', '.join(VARIANTS)}")
    torch.manual_seed(seed)
    _save_clip(folder)
    _save_t5(folder)
    FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=6,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=variant == "dev",
        axes_dims_rope=(2, 2, 4),
    ).save_pretrained(folder / "transformer")
    narrow = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
    AutoencoderKL.from_config(VAE | narrow).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler.from_config(SCHEDULERS[variant]).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": PIPELINE,
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save_clip(folder: Path) -> None:
    """Letters are tokens, at the end of a word or inside it; the marks come last, as in the model's own vocabulary."""
    tokens = [letter + end for end in ("", "</w>") for letter in LETTERS]
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(folder / "tokenizer")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=POOLED_WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
    ).save_pretrained(folder / "text_encoder")


def _save_t5(folder: Path) -> None:
    """A token a letter, with the space before it or alone."""
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -4.0)]
    letters = [(space + letter, -8.0) for space in ("", "▁") for letter in LETTERS]
    T5Tokenizer(vocab=marks + letters, extra_ids=0).save_pretrained(folder / "tokenizer_2")
    T5EncoderModel(
        T5Config(
            vocab_size=96,
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            tie_word_embeddings=False,
        )
    ).save_pretrained(folder / "text_encoder_2")
