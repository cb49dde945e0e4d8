"""Wan's rows: two experts, one expert, and a timestep a token; clips of text and of pictures; both schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanVACEPipeline
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v, pipeline_wan_vace
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from services.causal_stream import CausalCodec
from services.clip_writer import encode_frames
from services.media import decode_image, decode_inputs
from services.request import GenerationParams, Media, ResolvedParams
from tests.oracle.harness import OracleRow, Stock


def wish(
    prompt: str, seed: int, steps: int, width: int, height: int, num_frames: int, inputs: Sequence[Media] = ()
) -> GenerationParams:
    """Guidance is the variant's own: where there are two experts, each has its scale."""
    return GenerationParams(
        model="tiny",
        prompt=prompt,
        negative_prompt="still , blue",
        seed=seed,
        steps=steps,
        width=width,
        height=height,
        num_frames=num_frames,
        inputs=tuple(inputs),
    )


def picture(width: int, height: int, seed: int, role: str = "image") -> Media:
    """Noise as a PNG: every pixel counts."""
    frames = np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    return Media(*encode_frames(frames, "png", 90, 0.0), role)


def load_stock(folder: Path, dtype: torch.dtype) -> Stock:
    pipeline = WanPipeline.from_pretrained(folder, dtype=dtype)
    return lambda params: {"latents": call(pipeline, params)}


def load_stock_of_pictures(folder: Path, dtype: torch.dtype) -> Stock:
    pipeline = picture_pipeline(folder, dtype)
    # The VAE's convolutions differ from the library's in the last bits: here both sides have them.
    pipeline.vae._encode = CausalCodec(pipeline.vae).encode

    def run(params: ResolvedParams) -> dict[str, torch.Tensor]:
        # This pipeline's own needs the package ftfy; that of clips of text, else the same, leaves it out.
        with patch.object(pipeline_wan_i2v, "prompt_clean", pipeline_wan.prompt_clean):
            return {"latents": call(pipeline, params, **pictures_of(params))}

    return run


def picture_pipeline(folder: Path, dtype: torch.dtype) -> WanImageToVideoPipeline:
    """As the library makes it, its pictures scaled by Pillow."""
    processor = folder / "image_processor"
    others = {"image_processor": CLIPImageProcessorPil.from_pretrained(processor)} if processor.is_dir() else {}
    return WanImageToVideoPipeline.from_pretrained(folder, dtype=dtype, **others)


def pictures_of(params: ResolvedParams) -> dict[str, Image.Image]:
    """The inputs under the pipeline's names: "image", "last_image"."""
    return {media.role: Image.fromarray(decode_image(media)[0]) for media in params.inputs}


def call(pipeline: Any, params: ResolvedParams, **inputs: Any) -> torch.Tensor:
    """The pipeline's latents."""
    pipeline.set_progress_bar_config(disable=True)
    latents: torch.Tensor = pipeline(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        guidance_scale=params.guidance,
        guidance_scale_2=None if pipeline.config.boundary_ratio is None else params.guidance_2,
        width=params.width,
        height=params.height,
        num_frames=params.num_frames,
        num_inference_steps=params.steps,
        generator=torch.Generator().manual_seed(params.seed),
        output_type="latent",
        **inputs,
    ).frames
    return latents


def row(variant: str, *inputs: Sequence[Media], shortest: int = 1, **others: Any) -> OracleRow:
    """A row with these inputs of its three wishes."""
    first, second, third = inputs or ((), (), ())
    return OracleRow(
        family="wan",
        variant=variant,
        wishes=(
            wish("a red  circle &amp; a blue star", 1, 6, 64, 96, 9, first),
            wish("a large green square moves slowly to the left on a yellow background", 2, 5, 96, 64, 5, second),
            wish("dog", 3, 6, 64, 64, shortest, third),
        ),
        **({"load_stock": load_stock_of_pictures if inputs else load_stock} | others),
    )


def clip(width: int, height: int, num_frames: int, seed: int, role: str = "video") -> Media:
    """Noise in large squares as an MP4: every frame is another."""
    squares = np.random.default_rng(seed).integers(0, 256, (num_frames, height // 8, width // 8, 3), dtype=np.uint8)
    return Media(*encode_frames(squares.repeat(8, 1).repeat(8, 2), "mp4", 90, 16.0), role)


def load_vace(folder: Path, dtype: torch.dtype) -> Stock:
    pipeline = WanVACEPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.vae._encode = CausalCodec(pipeline.vae).encode

    def run(params: ResolvedParams) -> dict[str, torch.Tensor]:
        inputs = steering(params)
        with patch.object(pipeline_wan_vace, "prompt_clean", pipeline_wan.prompt_clean):
            latents = call(pipeline, params, **inputs)
        # Reference pictures are frames before the clip's own.
        return {"latents": latents[:, :, len(inputs.get("reference_images", ())) :]}

    return run


def steering(params: ResolvedParams) -> dict[str, Any]:
    """The inputs under the pipeline's names: "video", "mask", "reference_images"."""
    decoded = decode_inputs(params.inputs, params.num_frames)
    inputs: dict[str, Any] = {}
    for name, role in (("video", "video"), ("mask", "mask")):
        if role in decoded:
            [frames] = decoded[role]
            frames = frames.repeat(params.num_frames, 0) if len(frames) == 1 else frames
            inputs[name] = [Image.fromarray(frame).convert("RGB") for frame in frames]
    if "image" in decoded:
        inputs["reference_images"] = [Image.fromarray(frames[0]) for frames in decoded["image"]]
    return inputs


ONE = [[picture(64, 96, 1)], [picture(31, 50, 2)], [picture(128, 128, 3)]]
BOTH = [[*one, picture(90, 40, 4 + index, "last_image")] for index, one in enumerate(ONE)]
STEERED = [
    [clip(64, 96, 9, 1), clip(64, 96, 9, 2, "mask"), picture(50, 90, 3)],
    [clip(192, 128, 7, 4), picture(96, 64, 5, "mask")],
    [picture(31, 50, 6), picture(128, 40, 7)],
]

# With 6 steps, the two experts take 4 and 2.
ROWS = (
    row("t2v"),
    row("t2v_one_expert"),
    row("ti2v"),
    row("ti2v", *ONE, name="wan-ti2v-picture"),
    row("i2v", ONE[0], BOTH[1], ONE[2]),
    row("i2v_one_expert", *ONE),
    row("flf2v", *BOTH, shortest=5),
    row("vace", *STEERED, shortest=5, load_stock=load_vace),
)
