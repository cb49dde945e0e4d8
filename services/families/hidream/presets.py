"""HiDream-I1's variants with their limits, and its full-size configs.

Steps, guidance and shift are those that the authors publish for each model. The stock pipeline turns every size into
one of about a megapixel; here a size is what the picture gets, and a megapixel, 4096 tokens, is the most.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from services.family import Variant
from services.request import Limits

_FULL = Limits(
    output="image",
    size_multiple_px=16,
    max_side_px=2048,
    max_pixels=1024 * 1024,
    default_steps=50,
    default_guidance=5.0,
    default_negative_prompt="",
)
# Guidance is distilled into these.
_DEV = replace(_FULL, default_steps=28, default_guidance=1.0)
_FAST = replace(_DEV, default_steps=16)
PIPELINE = "HiDreamImagePipeline"
VARIANTS = {
    name: Variant(name=name, pipelines=(PIPELINE,), limits=limits)
    for name, limits in {"full": _FULL, "dev": _DEV, "fast": _FAST}.items()
}

_CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 248,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "eos_token_id": 2,
}
_CLIP_G = _CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "max_position_embeddings": 218,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "tie_word_embeddings": False,
}
_LLAMA: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "tie_word_embeddings": False,
}

# The first 32 blocks see a layer each, the other 16 the last one.
_TRANSFORMER: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 16,
    "num_single_layers": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "caption_channels": [4096, 4096],
    "text_emb_dim": 2048,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": [64, 32, 32],
    "max_resolution": [128, 128],
    "llama_layers": [*range(32), *[31] * 16],
}

_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def unipc(shift: float) -> dict[str, Any]:
    """Config of the UniPC scheduler over flow-matching noise levels.

    Args:
        shift: how far the levels lean to high noise.
    """
    return {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "solver_order": 2,
    }


def lcm(shift: float) -> dict[str, Any]:
    """Config of the distilled models' scheduler; `shift` as for `unipc`."""
    return {"_class_name": "FlowMatchLCMScheduler", "num_train_timesteps": 1000, "shift": shift}


_COMPONENTS = {
    "text_encoder": _CLIP_L,
    "text_encoder_2": _CLIP_G,
    "text_encoder_3": _T5,
    "text_encoder_4": _LLAMA,
    "transformer": _TRANSFORMER,
    "vae": _VAE,
}


def _preset(scheduler: dict[str, Any], **settings: Any) -> dict[str, dict[str, Any]]:
    named = ["diffusers", scheduler["_class_name"]]
    index = {"_class_name": PIPELINE, **settings, "scheduler": named}
    return {"model_index": index, **_COMPONENTS, "scheduler": scheduler}


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "hidream-i1-full": _preset(unipc(3.0)),
    "hidream-i1-dev": _preset(lcm(6.0)),
    "hidream-i1-fast": _preset(lcm(3.0), fast=True),
}
