"""FLUX.1's variants with their limits, and its full-size configs.

Steps and guidance are those that the authors and the stock pipeline publish for each model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from services.family import Variant
from services.request import Limits

PIPELINE = "FluxPipeline"

# `guidance` is what the distilled model is told. `guidance_2`, of true classifier-free guidance, is off at 1.
_DEV = Limits(
    output="image",
    size_multiple_px=16,
    default_steps=28,
    default_guidance=3.5,
    default_guidance_2=1.0,
    separate_guidance_2=True,
    default_negative_prompt="",
)
VARIANTS = {
    "dev": Variant(name="dev", pipelines=(PIPELINE,), limits=_DEV),
    "schnell": Variant(
        name="schnell", pipelines=(PIPELINE,), limits=replace(_DEV, default_steps=4, default_guidance=0.0)
    ),
}

_CLIP: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

_T5: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "is_encoder_decoder": False,
    "tie_word_embeddings": False,
}

_TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}

VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

SCHEDULERS: dict[str, dict[str, Any]] = {
    "dev": {
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
    "schnell": {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False},
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    f"flux1-{variant}": {
        "model_index": {"_class_name": PIPELINE},
        "text_encoder": _CLIP,
        "text_encoder_2": _T5,
        "transformer": _TRANSFORMER | {"guidance_embeds": variant == "dev"},
        "vae": VAE,
        "scheduler": SCHEDULERS[variant],
    }
    for variant in VARIANTS
}
