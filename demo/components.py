"""The demo model's components in the Qwen-Image format, built, saved and loaded.

Called by training and the evaluation. Sizes are the only thing that sets them apart from the real
checkpoint: classes, configuration keys, scheduler and file names are the family's own.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage, QwenImageCausalConv3d
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from demo.tokenizer import build_tokenizer

TEXT_WIDTH = 192
LATENT_CHANNELS = 16


@dataclass(slots=True)
class Components:
    """Everything a Qwen-Image folder holds."""

    tokenizer: Qwen2Tokenizer
    text_encoder: Qwen2_5_VLForConditionalGeneration
    transformer: QwenImageTransformer2DModel
    vae: AutoencoderKLQwenImage
    scheduler: FlowMatchEulerDiscreteScheduler


def build(seed: int = 0) -> Components:
    """Build all components with random weights in fp32, the same for the same seed."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    return Components(
        tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLForConditionalGeneration(text_config(tokenizer)),
        transformer=_transformer(),
        vae=_vae(),
        scheduler=_scheduler(),
    )


def load(folder: Path) -> Components:
    """Read a saved folder in fp32."""
    pipeline = QwenImagePipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    return Components(pipeline.tokenizer, pipeline.text_encoder, pipeline.transformer, pipeline.vae, pipeline.scheduler)


def copy_weights(source: Components, target: Components) -> None:
    """Give `target` the weights of `source`, which has the same sizes."""
    target.text_encoder.load_state_dict(source.text_encoder.state_dict())
    target.transformer.load_state_dict(source.transformer.state_dict())
    target.vae.load_state_dict(source.vae.state_dict())


def pipeline_of(components: Components) -> QwenImagePipeline:
    """The stock pipeline over these components."""
    return QwenImagePipeline(
        scheduler=components.scheduler,
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        transformer=components.transformer,
    )


def save(components: Components, folder: Path) -> None:
    """Write the folder that QwenImagePipeline.from_pretrained reads, fp16, one file per component.

    The modules are left in fp16.
    """
    for module in (components.text_encoder, components.transformer, components.vae):
        module.half()
    pipeline_of(components).save_pretrained(folder, safe_serialization=True)
    # transformers loads in the configuration's dtype and diffusers in fp32: name fp32, so that a plain
    # from_pretrained gives components that fit together.
    config_path = folder / "text_encoder" / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


def text_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL with three narrow layers and a vision tower small enough to be free."""
    token_id = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1_000_000.0},
        "bos_token_id": token_id["<|endoftext|>"],
        "eos_token_id": token_id["<|im_end|>"],
        "pad_token_id": token_id["<|endoftext|>"],
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id["<|image_pad|>"],
        video_token_id=token_id["<|video_pad|>"],
        vision_start_token_id=token_id["<|vision_start|>"],
        vision_end_token_id=token_id["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def _transformer() -> QwenImageTransformer2DModel:
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=8,
        attention_head_dim=40,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 16, 16),
    )
    # Blocks start as the identity and the prediction as zero (adaLN-zero), which trains fastest.
    for block in model.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            nn.init.zeros_(modulation.weight)
            nn.init.zeros_(modulation.bias)
    for layer in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def _vae() -> AutoencoderKLQwenImage:
    """An autoencoder for single images: of each causal kernel only the last temporal slice is not zero.

    For one frame the slices before it meet padding only, so they can never be trained on images.
    """
    vae = AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 3, 3],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            depth = module.kernel_size[0]
            with torch.no_grad():
                module.weight[:, :, :-1] = 0
                module.weight[:, :, -1] *= depth**0.5  # The variance a 2-D layer would start with.
    return vae


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's own schedule; at 256x256 its dynamic shift is exp(0.5)."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
        invert_sigmas=False,
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
    )
