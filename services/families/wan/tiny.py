"""Random Wan models of a few hundred thousand weights, for tests: two experts, one expert, and TI2V."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from services.families.wan.presets import BOUNDARY_T2V, unipc

TEXT_WIDTH = 48
WORDS = (
    "a an the and of on in to with red blue green yellow circle square star cat dog moves jumps left right up down "
    "small large over background camera still slowly , ."
)

# variant -> (latent channels, what the VAE has beside the common part, settings in model_index.json, scheduler)
RECIPES: dict[str, tuple[int, dict[str, Any], dict[str, Any], Any]] = {
    "t2v": (16, {}, {"boundary_ratio": BOUNDARY_T2V}, UniPCMultistepScheduler.from_config(unipc(12.0))),
    "t2v_one_expert": (16, {}, {}, FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "ti2v": (
        48,
        {
            "decoder_base_dim": 8,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
        {"expand_timesteps": True},
        UniPCMultistepScheduler.from_config(unipc(5.0)),
    ),
}


def tiny(folder: Path, variant: str, seed: int) -> None:
    """Writes the model in the diffusers format.

    Raises:
        ValueError: unknown variant.
    """
    if variant not in RECIPES:
        raise ValueError(f"unknown variant {variant!r}: there are {', '.join(RECIPES)}")
    channels, vae, settings, scheduler = RECIPES[variant]
    torch.manual_seed(seed)
    _save_tokenizer(folder / "tokenizer")
    UMT5EncoderModel(_text_config()).save_pretrained(folder / "text_encoder")
    experts = ("transformer", "transformer_2") if "boundary_ratio" in settings else ("transformer",)
    for expert in experts:
        _transformer(channels).save_pretrained(folder / expert)
    AutoencoderKLWan(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=(torch.randn(channels) * 0.1).tolist(),
        latents_std=(torch.rand(channels) + 0.5).tolist(),
        **vae,
    ).save_pretrained(folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.42.1",
        **settings,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        **{expert: ["diffusers", "WanTransformer3DModel"] for expert in experts},
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _transformer(channels: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=96,
        num_layers=4,
    )


def _save_tokenizer(folder: Path) -> None:
    """Whole words, and letters for what is none: T5's marks and its own end of text."""
    from transformers.models.t5.tokenization_t5 import T5Tokenizer

    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -4.0)]
    words = [(f"▁{word}", -1.0) for word in dict.fromkeys(WORDS.split())]
    letters = [(letter, -8.0) for letter in string.ascii_lowercase + string.digits]
    T5Tokenizer(vocab=marks + words + letters, extra_ids=0).save_pretrained(folder)


def _text_config() -> UMT5Config:
    return UMT5Config(
        vocab_size=128,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        is_encoder_decoder=False,
        tie_word_embeddings=False,
    )
