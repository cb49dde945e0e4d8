"""Wan's variants with their limits, and its full-size configs.

Guidance, steps, shift, boundary and frame rate are those that the authors publish for each model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from services.family import Variant
from services.request import Limits

# What the authors' own programs avoid by default.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，"
    "倒着走"
)

_TWO_EXPERTS = Limits(
    output="video",
    size_multiple_px=16,
    max_side_px=1280,
    max_pixels=1280 * 720,
    max_frames=81,
    frame_multiple=4,
    default_width=832,
    default_height=480,
    default_frames=81,
    default_fps=16.0,
    default_steps=40,
    default_guidance=4.0,
    default_guidance_2=3.0,
    default_negative_prompt=NEGATIVE_PROMPT,
)
_FROM_PICTURE = replace(
    _TWO_EXPERTS,
    default_guidance=3.5,
    default_guidance_2=3.5,
    min_inputs=1,
    max_inputs=1,
    optional_roles=("last_image",),
)
_ONE_EXPERT = replace(_TWO_EXPERTS, default_steps=50, default_guidance=5.0, default_guidance_2=0.0)
_TI2V = replace(
    _ONE_EXPERT,
    size_multiple_px=32,
    max_pixels=1280 * 704,
    max_frames=121,
    default_width=1280,
    default_height=704,
    default_frames=121,
    default_fps=24.0,
    max_inputs=1,
)
_FROM_PICTURE_ONE_EXPERT = replace(_ONE_EXPERT, default_steps=40, min_inputs=1, max_inputs=1)

MAX_REFERENCES = 4
_VACE = replace(_ONE_EXPERT, max_inputs=MAX_REFERENCES, optional_roles=("video", "mask"), needs_any_input=True)

VARIANTS = {
    "t2v": Variant(name="t2v", pipelines=("WanPipeline",), limits=_TWO_EXPERTS),
    "t2v_one_expert": Variant(name="t2v_one_expert", pipelines=("WanPipeline",), limits=_ONE_EXPERT),
    "vace": Variant(name="vace", pipelines=("WanVACEPipeline",), limits=_VACE),
    "ti2v": Variant(name="ti2v", pipelines=("WanPipeline", "WanImageToVideoPipeline"), limits=_TI2V),
    "i2v": Variant(name="i2v", pipelines=("WanImageToVideoPipeline",), limits=_FROM_PICTURE),
    "i2v_one_expert": Variant(
        name="i2v_one_expert", pipelines=("WanImageToVideoPipeline",), limits=_FROM_PICTURE_ONE_EXPERT
    ),
    "flf2v": Variant(
        name="flf2v",
        pipelines=("WanImageToVideoPipeline",),
        limits=replace(
            _FROM_PICTURE_ONE_EXPERT,
            default_width=1280,
            default_height=720,
            default_steps=50,
            needed_roles=("last_image",),
        ),
    ),
}

_TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 256384,
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

_TRANSFORMER_14B: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
_TRANSFORMER_1_3B = _TRANSFORMER_14B | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
# 16 channels of noise, 4 that say which frames are given, 16 of what is given.
_TRANSFORMER_I2V = _TRANSFORMER_14B | {"in_channels": 36}
_TRANSFORMER_I2V_21 = _TRANSFORMER_I2V | {"image_dim": 1280, "added_kv_proj_dim": 5120}
# 32 channels of what stays of a clip and what is made anew, 64 of the mask.
_TRANSFORMER_VACE = _TRANSFORMER_14B | {"vace_layers": list(range(0, 40, 5)), "vace_in_channels": 96}
_TRANSFORMER_VACE_1_3B = _TRANSFORMER_1_3B | {"vace_layers": list(range(0, 30, 2)), "vace_in_channels": 96}
_TRANSFORMER_5B = _TRANSFORMER_14B | {
    "num_attention_heads": 24,
    "in_channels": 48,
    "out_channels": 48,
    "ffn_dim": 14336,
    "num_layers": 30,
}

# Without latent statistics of its own, a config takes those of the class: Wan 2.1's.
_VAE_21: dict[str, Any] = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
# fmt: off
_VAE_22 = _VAE_21 | {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ],
    "latents_std": [
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ],
}
# fmt: on


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


BOUNDARY_T2V, BOUNDARY_I2V = 0.875, 0.9

_IMAGE_ENCODER: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}
IMAGE_PROCESSOR: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}
_SEEING = {"image_encoder": _IMAGE_ENCODER, "image_processor": IMAGE_PROCESSOR}


def _i2v_21(transformer: Mapping[str, Any], shift: float) -> dict[str, dict[str, Any]]:
    return {
        "model_index": {"_class_name": "WanImageToVideoPipeline"},
        "text_encoder": _TEXT_ENCODER,
        "transformer": dict(transformer),
        "vae": _VAE_21,
        "scheduler": unipc(shift),
        **_SEEING,
    }


def _vace(transformer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        "model_index": {"_class_name": "WanVACEPipeline"},
        "text_encoder": _TEXT_ENCODER,
        "transformer": dict(transformer),
        "vae": _VAE_21,
        "scheduler": unipc(16.0),
    }


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "wan2.2-t2v-a14b": {
        "model_index": {"_class_name": "WanPipeline", "boundary_ratio": BOUNDARY_T2V},
        "text_encoder": _TEXT_ENCODER,
        "transformer": _TRANSFORMER_14B,
        "transformer_2": _TRANSFORMER_14B,
        "vae": _VAE_21,
        "scheduler": unipc(12.0),
    },
    "wan2.2-ti2v-5b": {
        "model_index": {"_class_name": "WanPipeline", "expand_timesteps": True},
        "text_encoder": _TEXT_ENCODER,
        "transformer": _TRANSFORMER_5B,
        "vae": _VAE_22,
        "scheduler": unipc(5.0),
    },
    "wan2.2-i2v-a14b": {
        "model_index": {"_class_name": "WanImageToVideoPipeline", "boundary_ratio": BOUNDARY_I2V},
        "text_encoder": _TEXT_ENCODER,
        "transformer": _TRANSFORMER_I2V,
        "transformer_2": _TRANSFORMER_I2V,
        "vae": _VAE_21,
        "scheduler": unipc(5.0),
    },
    "wan2.1-i2v-14b-480p": _i2v_21(_TRANSFORMER_I2V_21, 3.0),
    "wan2.1-i2v-14b-720p": _i2v_21(_TRANSFORMER_I2V_21, 5.0),
    "wan2.1-flf2v-14b": _i2v_21(_TRANSFORMER_I2V_21 | {"pos_embed_seq_len": 514}, 16.0),
    "wan2.1-vace-1.3b": _vace(_TRANSFORMER_VACE_1_3B),
    "wan2.1-vace-14b": _vace(_TRANSFORMER_VACE),
    "wan2.1-t2v-1.3b": {
        "model_index": {"_class_name": "WanPipeline"},
        "text_encoder": _TEXT_ENCODER,
        "transformer": _TRANSFORMER_1_3B,
        "vae": _VAE_21,
        "scheduler": unipc(8.0),
    },
    "wan2.1-t2v-14b": {
        "model_index": {"_class_name": "WanPipeline"},
        "text_encoder": _TEXT_ENCODER,
        "transformer": _TRANSFORMER_14B,
        "vae": _VAE_21,
        "scheduler": unipc(3.0),
    },
}
