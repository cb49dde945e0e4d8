"""Random Wan models of a few hundred thousand weights, for tests: one of each variant."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from services.families.wan.presets import BOUNDARY_I2V, BOUNDARY_T2V, IMAGE_PROCESSOR, unipc

TEXT_WIDTH = 48
WORDS = (
    "a an the and of on in to with red blue green yellow circle square star cat dog moves jumps left right up down "
    "small large over background camera still slowly , ."
)

_TI2V_VAE = {
    "decoder_base_dim": 8,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
PICTURE_WIDTH, PICTURE_PX, PICTURE_PATCH_PX = 32, 28, 14
# Of one picture.
PICTURE_TOKENS = (PICTURE_PX // PICTURE_PATCH_PX) ** 2 + 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """What sets a variant's tiny model apart.

    Attributes:
        settings: of the pipeline, in model_index.json.
        given: channels beside the latents' own.
        transformer, vae: of their configs.
    """

    scheduler: Any
    pipeline: str = "WanPipeline"
    settings: Mapping[str, Any] = field(default_factory=dict)
    channels: int = 16
    given: int = 0
    transformer: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)


def _unipc(shift: float) -> Any:
    return UniPCMultistepScheduler.from_config(unipc(shift))


_SEES = {"image_dim": PICTURE_WIDTH, "added_kv_proj_dim": 96}
_I2V = "WanImageToVideoPipeline"
RECIPES = {
    "t2v": Recipe(_unipc(12.0), settings={"boundary_ratio": BOUNDARY_T2V}),
    "t2v_one_expert": Recipe(FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "ti2v": Recipe(_unipc(5.0), settings={"expand_timesteps": True}, channels=48, vae=_TI2V_VAE),
    "i2v": Recipe(_unipc(5.0), pipeline=_I2V, settings={"boundary_ratio": BOUNDARY_I2V}, given=20),
    "i2v_one_expert": Recipe(_unipc(3.0), pipeline=_I2V, given=20, transformer=_SEES),
    "vace": Recipe(
        FlowMatchEulerDiscreteScheduler(shift=5.0),
        pipeline="WanVACEPipeline",
        transformer={"vace_layers": [0, 2], "vace_in_channels": 32 + 64},
    ),
    "flf2v": Recipe(
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        pipeline=_I2V,
        given=20,
        transformer=_SEES | {"pos_embed_seq_len": 2 * PICTURE_TOKENS},
    ),
}


def tiny(folder: Path, variant: str, seed: int) -> None:
    """Writes the model in the diffusers format.

    Raises:
        ValueError: unknown variant.
    """
    if variant not in RECIPES:
        raise ValueError(f"unknown variant {variant!r}: there are {', '.join(RECIPES)}")
    recipe = RECIPES[variant]
    torch.manual_seed(seed)
    _save_tokenizer(folder / "tokenizer")
    UMT5EncoderModel(_text_config()).save_pretrained(folder / "text_encoder")
    experts = ("transformer", "transformer_2") if "boundary_ratio" in recipe.settings else ("transformer",)
    for expert in experts:
        transformer = _transformer(recipe)
        transformer.save_pretrained(folder / expert)
    AutoencoderKLWan(
        base_dim=8,
        z_dim=recipe.channels,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=(torch.randn(recipe.channels) * 0.1).tolist(),
        latents_std=(torch.rand(recipe.channels) + 0.5).tolist(),
        **recipe.vae,
    ).save_pretrained(folder / "vae")
    recipe.scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": recipe.pipeline,
        "_diffusers_version": "0.42.1",
        **recipe.settings,
        "scheduler": ["diffusers", type(recipe.scheduler).__name__],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        **dict.fromkeys(experts, ["diffusers", type(transformer).__name__]),
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if "image_dim" in recipe.transformer:
        _save_image_encoder(folder)
        index |= {
            "image_encoder": ["transformers", "CLIPVisionModel"],
            "image_processor": ["transformers", "CLIPImageProcessor"],
        }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _transformer(recipe: Recipe) -> Any:
    cls: Any = WanVACETransformer3DModel if "vace_layers" in recipe.transformer else WanTransformer3DModel
    transformer = cls(
        num_attention_heads=6,
        attention_head_dim=16,
        in_channels=recipe.channels + recipe.given,
        out_channels=recipe.channels,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=96,
        num_layers=4,
        **recipe.transformer,
    )
    if "pos_embed_seq_len" in recipe.transformer:
        # Zeros as the class makes it.
        torch.nn.init.normal_(transformer.condition_embedder.image_embedder.pos_embed)
    return transformer


def _save_image_encoder(folder: Path) -> None:
    encoder = {
        "hidden_size": PICTURE_WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": PICTURE_PX,
        "patch_size": PICTURE_PATCH_PX,
        "hidden_act": "gelu",
    }
    CLIPVisionModel(CLIPVisionConfig(**encoder)).save_pretrained(folder / "image_encoder")
    size = {"size": {"shortest_edge": PICTURE_PX}, "crop_size": {"height": PICTURE_PX, "width": PICTURE_PX}}
    processor = {"image_processor_type": "CLIPImageProcessor", **IMAGE_PROCESSOR, **size}
    (folder / "image_processor").mkdir(parents=True)
    (folder / "image_processor" / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


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
