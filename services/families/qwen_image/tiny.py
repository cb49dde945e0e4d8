"""A random Qwen-Image of a few hundred thousand weights, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from services.families.qwen_image.presets import PROCESSOR, SCHEDULER, VARIANTS

TEXT_WIDTH = 48
# Of input pictures, for the text encoder and the VAE; a megapixel would take a minute.
AREA_PX = {"edit": (96 * 64, 96 * 64), "edit_plus": (64 * 64, 96 * 64), "edit_2511": (64 * 64, 96 * 64)}
WORDS = (
    "system user assistant Describe the image by detailing color , shape size texture quantity text spatial "
    "relationships of objects and background : a an red blue green circle square star on in with left right small "
    "large cat dog photo painting "
    "key features input image ( ), objects then explain how user 's instruction should alter or modify . Generate new "
    "that meets requirements while maintaining consistency original where appropriate make it Picture 1 2 3"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def tiny(folder: Path, variant: str, seed: int) -> None:
    """Writes the model in the diffusers format.

    Raises:
        ValueError: unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: there are {', '.join(VARIANTS)}")
    layered = variant == "layered"
    torch.manual_seed(seed)
    _save_tokenizer(folder / "tokenizer")
    Qwen2_5_VLForConditionalGeneration(_text_config()).save_pretrained(folder / "text_encoder")
    QwenImageTransformer2DModel(
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        use_additional_t_cond=layered,
        use_layer3d_rope=layered,
        zero_cond_t=variant == "edit_2511",
    ).save_pretrained(folder / "transformer")
    mean = torch.randn(16) * 0.1
    std = torch.rand(16) + 0.5
    AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=mean.tolist(),
        latents_std=std.tolist(),
        input_channels=4 if layered else 3,
    ).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": VARIANTS[variant].pipelines[0],
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    if variant in AREA_PX:
        vision_area_px, latent_area_px = AREA_PX[variant]
        index |= {
            "processor": ["transformers", "Qwen2VLProcessor"],
            "vision_area_px": vision_area_px,
            "latent_area_px": latent_area_px,
        }
        _save_tokenizer(folder / "processor")
        config = {"image_processor_type": "Qwen2VLImageProcessor", **PROCESSOR}
        (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save_tokenizer(folder: Path) -> None:
    """Words, marks and newlines are tokens, so the templates' prefixes have as many as in the model's own tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    words = [*SPECIAL, "<unk>", "\n", *dict.fromkeys(WORDS.split())]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|'s|\),|\w+|[^\w\s]"), "removed", invert=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        padding_side="right",
    ).save_pretrained(folder)


def _text_config() -> Qwen2_5_VLConfig:
    text = {
        "vocab_size": 128,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 4, 4], "rope_theta": 1_000_000.0},
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=5, vision_start_token_id=3, vision_end_token_id=4
    )
