"""Qwen-Image's rows."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import QwenImagePipeline

from services.request import GenerationParams, ResolvedParams
from tests.oracle.harness import OracleRow, Stock


def wish(prompt: str, seed: int, steps: int, width: int, height: int) -> GenerationParams:
    return GenerationParams(
        model="tiny", prompt=prompt, seed=seed, steps=steps, width=width, height=height, guidance=4.0
    )


def load_t2i(folder: Path, dtype: torch.dtype) -> Stock:
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)

    def run(params: ResolvedParams) -> dict[str, torch.Tensor]:
        latents = pipeline(
            prompt=params.prompt,
            negative_prompt=params.negative_prompt,
            true_cfg_scale=params.guidance,
            width=params.width,
            height=params.height,
            num_inference_steps=params.steps,
            generator=torch.Generator().manual_seed(params.seed),
            output_type="latent",
        ).images
        return {"latents": latents}

    return run


ROWS = (
    OracleRow(
        family="qwen_image",
        variant="t2i",
        wishes=(
            wish("a red circle", 1, 5, 64, 80),
            wish("a photo of a large green square on a blue background", 2, 4, 96, 80),
            wish("dog", 3, 4, 64, 112),
        ),
        load_stock=load_t2i,
    ),
)
