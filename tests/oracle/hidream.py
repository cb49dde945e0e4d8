"""HiDream's rows: the full model with UniPC, dev with fresh noise each step; squares and other shapes.

The third variant, fast, is dev with another shift and fewer steps.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import FlowMatchLCMScheduler, HiDreamImagePipeline

from services.families.hidream.dit import step_noise
from services.request import GenerationParams, ResolvedParams
from tests.oracle.harness import OracleRow, Stock


def wish(prompt: str, seed: int, steps: int, size: tuple[int, int], negative: str = "") -> GenerationParams:
    width, height = size
    return GenerationParams(
        model="tiny",
        prompt=prompt,
        negative_prompt=negative,
        seed=seed,
        steps=steps,
        width=width,
        height=height,
        guidance=4.0,
    )


def load_stock(folder: Path, dtype: torch.dtype) -> Stock:
    pipeline = open_pipeline(folder, dtype)
    row_by_row(pipeline)
    return lambda params: {"latents": call(pipeline, params)}


def open_pipeline(folder: Path, dtype: torch.dtype) -> HiDreamImagePipeline:
    pipeline = HiDreamImagePipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def row_by_row(pipeline: HiDreamImagePipeline) -> None:
    """Gives the transformer one row at a time.

    The pipeline runs both branches as rows of one batch. Last bits depend on how many rows share a product, and what
    is compared bit for bit here is batch 1.
    """
    forward = pipeline.transformer.forward

    def alone(
        hidden_states, timesteps, encoder_hidden_states_t5, encoder_hidden_states_llama3, pooled_embeds, **others
    ):
        rows = [
            forward(
                hidden_states=hidden_states[row : row + 1],
                timesteps=timesteps[row : row + 1],
                encoder_hidden_states_t5=encoder_hidden_states_t5[row : row + 1],
                encoder_hidden_states_llama3=encoder_hidden_states_llama3[:, row : row + 1],
                pooled_embeds=pooled_embeds[row : row + 1],
                **others,
            )[0]
            for row in range(len(hidden_states))
        ]
        return (torch.cat(rows),)

    pipeline.transformer.forward = alone


def seed_steps(pipeline: HiDreamImagePipeline, seed: int) -> None:
    """Gives each step its noise. The pipeline takes it from the process's generator, which any other request moves."""
    scheduler = pipeline.scheduler
    step, generators = type(scheduler).step, (step_noise(seed, index) for index in range(1000))

    def seeded(model_output, timestep, sample, generator=None, return_dict=True):
        return step(scheduler, model_output, timestep, sample, generator or next(generators), return_dict)

    scheduler.step = seeded


def call(pipeline: HiDreamImagePipeline, params: ResolvedParams, output_type: str = "latent"):
    """The pipeline's latents, or its pictures, in the size that is asked for instead of the fixed megapixel."""
    pipeline.default_sample_size = math.sqrt(params.width * params.height) / pipeline.vae_scale_factor * (1 + 1e-9)
    if isinstance(pipeline.scheduler, FlowMatchLCMScheduler):
        seed_steps(pipeline, params.seed)
    return pipeline(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        guidance_scale=params.guidance,
        width=params.width,
        height=params.height,
        num_inference_steps=params.steps,
        generator=torch.Generator().manual_seed(params.seed),
        output_type=output_type,
    ).images


ROWS = tuple(
    OracleRow(
        family="hidream",
        variant=variant,
        wishes=(
            wish("a red circle", 1, 5, (64, 80), "blurred"),
            wish("a photo of a large green square on a blue background, " * 4, 2, 4, (96, 96)),
            wish("dog", 3, 4, (64, 112)),
        ),
        load_stock=load_stock,
    )
    for variant in ("full", "dev")
)
