"""Pictures and masks at full size, on one GPU, without services: `python -m benchmarks.full_size_edits`.

Qwen-Image-Edit-2511 with one and two input pictures and with a mask; with `--preset qwen-image` the plain model, from
text and with a mask. Random weights in bfloat16, compiled blocks, guidance by two branches. Printed are seconds a step
(to be read beside those of the plain model), peak memory, and whether what a mask keeps has the latents of the
original. Text encoder and denoiser are on the device one after the other. A rehearsal without a GPU: `--source FOLDER
--device cpu --side 64 --steps 2`, with the folder of a tiny model.
"""

from __future__ import annotations

import argparse
import gc
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.full_size_engines import config_of, denoise
from benchmarks.full_size_setting import FAMILY, note
from benchmarks.load import prompt, write_result
from dit_svc.engine import DenoiseJob
from dit_svc.loading import open_engine as open_dit
from services.config import StageConfig
from services.describe import limits_of, open_model
from services.families.qwen_image.latents import pack
from services.family import Tensors
from services.request import GenerationParams, Media, ResolvedParams, resolve
from text_encoder_svc.engine import open_engine as open_text
from vae_svc.engine import VaeChunk, VaeEngine, VaeJob, encode_alone
from vae_svc.loading import open_engine as open_vae


@dataclass(frozen=True, slots=True)
class Case:
    """A request with its conditions."""

    name: str
    params: ResolvedParams
    conditions: Tensors


def png(width: int, height: int, *, opaque: bool = True) -> bytes:
    """Noise in blocks of 4x4 pixels, as a file for each pixel's own would exceed what a request may bring; or a mask
    that is transparent in the middle half of each side."""
    blocks = np.random.default_rng(width).integers(0, 256, (height // 4, width // 4, 4), np.uint8)
    pixels = blocks.repeat(4, 0).repeat(4, 1)
    pixels[..., 3] = 255
    if not opaque:
        pixels[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4, 3] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def inputs_of(side: int, takes_pictures: bool) -> dict[str, tuple[Media, ...]]:
    """By the case's name; the second picture is of another shape."""
    first, second = (Media("image/png", png(width, side)) for width in (side, 3 * side // 4))
    masked = (first, Media("image/png", png(side, side, opaque=False), role="mask"))
    if takes_pictures:
        return {"one picture": (first,), "two pictures": (first, second), "a mask": masked}
    return {"text": (), "a mask": masked}


def cases(config: StageConfig, vae: VaeEngine, side: int, steps: int) -> Iterator[Case]:
    """Everything that is asked for, encoded; the text encoder goes at the end."""
    text = open_text(config)
    limits = limits_of(config, open_model(config.model))
    for name, inputs in inputs_of(side, bool(limits.min_inputs)).items():
        wish = GenerationParams(
            model="m", prompt=prompt(0), width=side, height=side, steps=steps, guidance=4.0, inputs=inputs
        )
        params = resolve(wish, limits, seed=0)
        text.submit(name, params)
        [encoded] = text.tick()
        if encoded.error is not None:
            raise encoded.error
        conditions = dict(encoded.tensors)
        if inputs:
            conditions |= encode_alone(vae, VaeJob(name, params))
        yield Case(name, params, conditions)


def kept_error(case: Case, latents: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Of a mask: how far what is kept is from the original, which part is made anew, and that this part is another.

    Raises:
        RuntimeError: kept latents are not those of the original, or nothing has been made anew.
    """
    kept = pack(case.conditions["kept"].cpu()).to(dtype)
    anew = pack(case.conditions["mask"].cpu().expand_as(case.conditions["kept"])).bool()
    worst = (latents[~anew] - kept[~anew]).abs().max().item()
    moved = (latents[anew] - kept[anew]).abs().mean().item()
    if worst or not moved:
        raise RuntimeError(f"kept latents are {worst} off the original, the others {moved}")
    return {"kept_max_error": worst, "made_anew_share": anew.float().mean().item(), "made_anew_mean_change": moved}


def decoded_shape(vae: VaeEngine, case: Case, latents: torch.Tensor) -> list[int]:
    """Of the picture; the engine refuses one that is not finite."""
    vae.submit(VaeJob(case.name, case.params, {"latents": latents}))
    shapes: list[list[int]] = []
    while vae.busy:
        for event in vae.tick():
            if isinstance(event, VaeChunk):
                shapes.append(list(event.frames.shape))
            elif event.error is not None:
                raise event.error
    [shape] = shapes
    if shape != [1, case.params.height, case.params.width, 3]:
        raise RuntimeError(f"the picture has the shape {shape}")
    return shape


@torch.inference_mode()
def run(config: StageConfig, side: int, steps: int) -> dict[str, Any]:
    """All cases, one after the other."""
    # The denoiser's features are none of the other stages'.
    plain = replace(config, features={})
    vae = open_vae(plain)
    asked = list(cases(plain, vae, side, steps))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    note("encoded")
    dit, features = open_dit(config)
    note("the denoiser is ready")
    facts: dict[str, Any] = {}
    for case in asked:
        made = denoise(dit, DenoiseJob(case.name, case.params, case.conditions))
        assert made.latents is not None
        facts[case.name] = made.figures() | {"picture": decoded_shape(vae, case, made.latents)}
        if "mask" in case.conditions:
            facts[case.name] |= kept_error(case, made.latents, dit.model.dtype)
        note(f"{case.name}: {facts[case.name]}")
    return facts | {"recompiles": features.metrics().get("dit_recompiles_total", 0)}


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="random:0", help="weights: random:SEED or a folder")
    parser.add_argument("--preset", choices=("qwen-image", "qwen-image-edit-2511"), default="qwen-image-edit-2511")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--side", type=int, default=1024, help="side of the picture in pixels")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    work = {"preset": args.preset, "side_px": args.side, "steps": args.steps}
    facts = run(config_of(args.source, FAMILY, args.preset, args.device), args.side, args.steps)
    write_result(args.json, "full_size_edits", {"work": work, "cases": facts})


if __name__ == "__main__":
    main()
