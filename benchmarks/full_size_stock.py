"""diffusers' own Qwen-Image pipeline, timed: compiled blocks, cuDNN attention where there is a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from benchmarks.full_size_setting import Setting, Timing, note
from services.weights import open_source

# As long as what the benchmark's prompts become, the template's prefix included.
TEMPLATE_TOKENS = 34
TEXT_TOKENS = TEMPLATE_TOKENS + 24


def run_stock(setting: Setting) -> Timing:
    """Loads the pipeline, makes one picture to warm up, then the measured ones."""
    pipeline, encoder = _load(setting)
    note("loaded")
    _picture(pipeline, encoder, setting, 0)
    note("warm")
    pairs = []
    for index in range(setting.runs):
        pairs.append(_picture(pipeline, encoder, setting, index + 1))
        note(f"{pairs[-1][0]:.3f} s, {pairs[-1][1]:.4f} s a step")
    return Timing(statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs), setting.runs)


def _load(setting: Setting) -> tuple[Any, Any]:
    source = open_source(setting.source, family=setting.family, preset=setting.preset)
    device = torch.device(setting.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder = source.load_transformers(
        Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, "text_encoder", device, dtype
    )
    transformer: Any = source.load(QwenImageTransformer2DModel, "transformer", device, dtype)
    if device.type == "cuda":
        transformer.set_attention_backend("_native_cudnn")
    transformer.compile_repeated_blocks(fullgraph=True)
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(source.config("scheduler", "scheduler_config.json")),
        vae=source.load(AutoencoderKLQwenImage, "vae", device, dtype),
        text_encoder=encoder,
        tokenizer=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, encoder


def _embed(encoder: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and mask of random ids of fixed length."""
    ids = torch.randint(encoder.config.get_text_config().vocab_size, (1, TEXT_TOKENS), device=encoder.device)
    hidden = encoder(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    embeds = hidden.hidden_states[-1][:, TEMPLATE_TOKENS:]
    return embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)


@torch.inference_mode()
def _picture(pipeline: Any, encoder: Any, setting: Setting, seed: int) -> tuple[float, float]:
    """Seconds end to end, and seconds a step."""
    moments: list[float] = []
    started_s = time.perf_counter()
    (positive, mask), (negative, negative_mask) = _embed(encoder), _embed(encoder)
    picture = pipeline(
        prompt_embeds=positive,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=negative_mask,
        true_cfg_scale=setting.guidance,
        height=setting.side_px,
        width=setting.side_px,
        num_inference_steps=setting.steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_step_end=_stepped(moments),
    ).images[0]
    picture.save("/dev/null", format="png", compress_level=1)
    return time.perf_counter() - started_s, (moments[-1] - moments[0]) / (len(moments) - 1)


def _stepped(moments: list[float]) -> Callable[..., dict[str, Any]]:
    def stepped(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
        return values

    return stepped
