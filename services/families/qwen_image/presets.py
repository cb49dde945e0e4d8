"""Qwen-Image's variants with their limits, and its full-size configs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from services.family import Variant
from services.request import Limits

# The schedule is stretched so that its last noise level is shift_terminal; a single level cannot be both ends. For
# weights without shift_terminal, a config may set limits.min_steps to 1.
_LIMITS = Limits(output="image", size_multiple_px=16, max_side_px=3584, min_steps=2, default_negative_prompt=" ")
# Made for one to three pictures, as its authors say.
_EDIT_PLUS = replace(_LIMITS, default_steps=40, min_inputs=1, max_inputs=3, optional_roles=("mask",))
VARIANTS = {
    "t2i": Variant(
        name="t2i",
        pipelines=("QwenImagePipeline",),
        limits=replace(_LIMITS, max_inputs=1, optional_roles=("mask",), pictures_need_mask=True),
    ),
    "edit": Variant(
        name="edit",
        pipelines=("QwenImageEditPipeline",),
        limits=replace(_LIMITS, min_inputs=1, max_inputs=1, optional_roles=("mask",)),
    ),
    "layered": Variant(
        name="layered",
        pipelines=("QwenImageLayeredPipeline",),
        limits=replace(
            _LIMITS,
            output="layers",
            max_side_px=2048,
            max_pixels=1024 * 1024,
            max_frames=8,
            default_width=640,
            default_height=640,
            default_frames=4,
            min_inputs=1,
            max_inputs=1,
        ),
    ),
    "edit_plus": Variant(name="edit_plus", pipelines=("QwenImageEditPlusPipeline",), limits=_EDIT_PLUS),
    "edit_2511": Variant(name="edit_2511", pipelines=("QwenImageEditPlusPipeline",), limits=_EDIT_PLUS),
}

_TEXT_ENCODER: dict[str, Any] = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
        "tokens_per_second": 2,
    },
    "tie_word_embeddings": False,
}

_TRANSFORMER: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}

_VAE: dict[str, Any] = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}

PROCESSOR: dict[str, Any] = {
    "min_pixels": 56 * 56,
    "max_pixels": 16384 * 28 * 28,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}

_COMPONENTS = {"text_encoder": _TEXT_ENCODER, "transformer": _TRANSFORMER, "vae": _VAE, "scheduler": SCHEDULER}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen-image": {"model_index": {"_class_name": "QwenImagePipeline"}, **_COMPONENTS},
    "qwen-image-layered": {
        "model_index": {"_class_name": "QwenImageLayeredPipeline"},
        **_COMPONENTS,
        "transformer": _TRANSFORMER | {"use_additional_t_cond": True, "use_layer3d_rope": True},
        "vae": _VAE | {"input_channels": 4},
    },
    # The same shape, trained further.
    "qwen-image-2512": {"model_index": {"_class_name": "QwenImagePipeline"}, **_COMPONENTS},
    "qwen-image-edit-2509": {
        "model_index": {"_class_name": "QwenImageEditPlusPipeline"},
        "processor": PROCESSOR,
        **_COMPONENTS,
    },
    "qwen-image-edit-2511": {
        "model_index": {"_class_name": "QwenImageEditPlusPipeline"},
        "processor": PROCESSOR,
        **_COMPONENTS,
        "transformer": _TRANSFORMER | {"zero_cond_t": True},
    },
    "qwen-image-edit": {
        "model_index": {"_class_name": "QwenImageEditPipeline"},
        "processor": PROCESSOR,
        **_COMPONENTS,
    },
}
