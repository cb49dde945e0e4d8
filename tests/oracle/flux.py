"""FLUX's rows: dev, told its guidance, alone and with true guidance beside it; schnell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import FluxPipeline

from services.request import GenerationParams, ResolvedParams
from tests.oracle.harness import OracleRow, Stock

TEXT_TOKENS = {"dev": 512, "schnell": 256}


def wish(prompt: str, seed: int, steps: int, size: tuple[int, int], guidance: float) -> GenerationParams:
    width, height = size
    return GenerationParams(
        model="tiny", prompt=prompt, seed=seed, steps=steps, width=width, height=height, guidance=guidance
    )


def loader(max_sequence_length: int):
    """Loads the pipeline, which takes the text's length from its caller."""

    def load_stock(folder: Path, dtype: torch.dtype) -> Stock:
        pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype)
        return lambda params: {"latents": call(pipeline, params, max_sequence_length)}

    return load_stock


def call(pipeline, params: ResolvedParams, max_sequence_length: int, output_type: str = "latent"):
    """The pipeline's latents, or its pictures."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        guidance_scale=params.guidance,
        true_cfg_scale=params.guidance_2,
        width=params.width,
        height=params.height,
        num_inference_steps=params.steps,
        max_sequence_length=max_sequence_length,
        generator=torch.Generator().manual_seed(params.seed),
        output_type=output_type,
    ).images


def row(variant: str, steps: int) -> OracleRow:
    """Each wish has a guidance of its own; the second has true guidance too."""
    plain = (
        wish("a red circle", 1, steps + 1, (64, 80), 3.5),
        wish("a photo of a large green square on a blue background", 2, steps, (96, 80), 2.0),
        wish("dog", 3, steps, (64, 112), 5.0),
    )
    first, second, third = plain
    return OracleRow(
        family="flux",
        variant=variant,
        wishes=(first, replace(second, guidance_2=2.5, negative_prompt="red, blurred"), third),
        load_stock=loader(TEXT_TOKENS[variant]),
        together=tuple(replace(one, width=64, height=80) for one in plain),
    )


ROWS = (row("dev", 4), row("schnell", 4))
