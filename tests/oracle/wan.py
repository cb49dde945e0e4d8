"""Wan's rows: two experts, one expert, and a timestep a token; both schedulers."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanPipeline

from services.request import GenerationParams, ResolvedParams
from tests.oracle.harness import OracleRow, Stock


def wish(prompt: str, seed: int, steps: int, width: int, height: int, num_frames: int) -> GenerationParams:
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
    )


def load_stock(folder: Path, dtype: torch.dtype) -> Stock:
    pipeline = WanPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)

    def run(params: ResolvedParams) -> dict[str, torch.Tensor]:
        latents = pipeline(
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
        ).frames
        return {"latents": latents}

    return run


# With 6 steps, the two experts take 4 and 2.
ROWS = tuple(
    OracleRow(
        family="wan",
        variant=variant,
        wishes=(
            wish("a red  circle &amp; a blue star", 1, 6, 64, 96, 9),
            wish("a large green square moves slowly to the left on a yellow background", 2, 5, 96, 64, 5),
            wish("dog", 3, 6, 64, 64, 1),
        ),
        load_stock=load_stock,
    )
    for variant in ("t2v", "t2v_one_expert", "ti2v")
)
