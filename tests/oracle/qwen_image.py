"""Qwen-Image's rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import (
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
)
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
    pipeline_qwenimage_layered,
)
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from services.causal_stream import CausalCodec
from services.clip_writer import encode_frames
from services.media import decode_image
from services.request import GenerationParams, Media, ResolvedParams
from tests.oracle.harness import OracleRow, Stock


def wish(prompt: str, seed: int, steps: int, size: tuple[int, int], *inputs: Media) -> GenerationParams:
    width, height = size
    return GenerationParams(
        model="tiny", prompt=prompt, seed=seed, steps=steps, width=width, height=height, guidance=4.0, inputs=inputs
    )


def picture(width: int, height: int, seed: int, channels: int = 3) -> Media:
    """Noise as a PNG, with 4 channels in its transparency too: every pixel counts."""
    frames = np.random.default_rng(seed).integers(0, 256, (1, height, width, channels), dtype=np.uint8)
    return Media(*encode_frames(frames, "png", 90, 0.0))


def mask(width: int, height: int, seed: int) -> Media:
    """A PNG that is transparent in a box a third as long, and half so along a band; its colours say nothing."""
    pixels = np.random.default_rng(seed).integers(0, 256, (1, height, width, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[:, height // 4 : height // 4 + height // 3, width // 3 : 2 * width // 3, 3] = 0
    pixels[:, -height // 5 :, :, 3] = 90
    return Media(*encode_frames(pixels, "png", 90, 0.0), role="mask")


def stock_mask(media: Media) -> Image.Image:
    """As the stock pipelines take it: white where the picture is edited."""
    return Image.fromarray(255 - decode_image(media, alpha=True)[0, :, :, 3])


def load_t2i(folder: Path, dtype: torch.dtype) -> Stock:
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype=dtype)
    return lambda params: {"latents": call(pipeline, params)}


def load_edit(folder: Path, dtype: torch.dtype) -> Stock:
    pipeline = edit_pipeline(folder, dtype)
    give_token_types(pipeline)
    # The single-frame path of the VAE differs from the library's in the last bits: here both sides have it.
    pipeline.vae._encode = CausalCodec(pipeline.vae).encode
    return lambda params: {"latents": edited(pipeline, folder, params)}


def load_masked_edit(folder: Path, dtype: torch.dtype) -> Stock:
    pipeline = edit_pipeline(folder, dtype, QwenImageEditInpaintPipeline)
    encode_as_edits_do(pipeline)
    give_token_types(pipeline)
    pipeline.vae._encode = CausalCodec(pipeline.vae).encode
    area_px = json.loads((folder / "model_index.json").read_text())["latent_area_px"]
    dimensions = pipeline_qwenimage_edit_inpaint.calculate_dimensions

    def run(params: ResolvedParams) -> dict[str, torch.Tensor]:
        media, area = params.inputs
        pictures = {"image": Image.fromarray(decode_image(media)[0]), "mask_image": stock_mask(area)}
        resized = patch.object(
            pipeline_qwenimage_edit_inpaint, "calculate_dimensions", lambda _, ratio: dimensions(area_px, ratio)
        )
        with resized:
            # All of its noise, as an edit without a mask begins.
            return {"latents": call(pipeline, params, strength=1.0, **pictures)}

    return run


def encode_as_edits_do(pipeline: Any) -> None:
    """Gives a pipeline for masks the picture's likeliest latents: it draws them, where the one for edits does not."""
    pipeline._encode_vae_image = QwenImageEditPipeline._encode_vae_image.__get__(pipeline)


def load_masked(folder: Path, dtype: torch.dtype) -> Stock:
    pipeline = QwenImageInpaintPipeline.from_pretrained(folder, dtype=dtype)
    encode_as_edits_do(pipeline)
    pipeline.vae._encode = CausalCodec(pipeline.vae).encode

    def run(params: ResolvedParams) -> dict[str, torch.Tensor]:
        media, area = params.inputs
        pictures = {"image": Image.fromarray(decode_image(media)[0]), "mask_image": stock_mask(area)}
        return {"latents": call(pipeline, params, strength=1.0, **pictures)}

    return run


def load_edit_plus(folder: Path, dtype: torch.dtype) -> Stock:
    pipeline = edit_pipeline(folder, dtype, QwenImageEditPlusPipeline)
    give_token_types(pipeline)
    pipeline.vae._encode = CausalCodec(pipeline.vae).encode
    settings = json.loads((folder / "model_index.json").read_text())
    areas = {
        "CONDITION_IMAGE_SIZE": settings["vision_area_px"],
        "VAE_IMAGE_SIZE": settings["latent_area_px"],
    }

    def run(params: ResolvedParams) -> dict[str, torch.Tensor]:
        images = [Image.fromarray(decode_image(media)[0]) for media in params.inputs if media.role == "image"]
        masks = [stock_mask(media) for media in params.inputs if media.role == "mask"]
        put_back = {"callback_on_step_end": keeper(pipeline, params, images[0], *masks)} if masks else {}
        with patch.multiple(pipeline_qwenimage_edit_plus, **areas):
            return {"latents": call(pipeline, params, image=images, **put_back)}

    return run


def keeper(pipeline: QwenImageEditPlusPipeline, params: ResolvedParams, picture: Image.Image, area: Image.Image) -> Any:
    """What puts a picture back outside of a mask after each step: the stock pipeline for masks has no such edits."""
    parts = {name: pipeline.components[name] for name in ("scheduler", "vae", "text_encoder", "tokenizer")}
    inpaint = QwenImageInpaintPipeline(transformer=pipeline.transformer, **parts)
    encode_as_edits_do(inpaint)
    size = {"height": params.height, "width": params.width}
    pixels, mask_pixels = (
        processor.preprocess(image, **size)
        for processor, image in ((inpaint.image_processor, picture), (inpaint.mask_processor, area))
    )
    sides, kind = (1, 16, params.height, params.width), (pipeline.dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(params.seed)
    # At full noise the timestep has no part in it; the scheduler is set by the call that follows.
    scaled = patch.object(inpaint.scheduler, "scale_noise", lambda sample, _, noise: noise)
    with scaled:
        _, noise, kept = inpaint.prepare_latents(pixels, None, *sides, *kind, generator)
    anew, _ = inpaint.prepare_mask_latents(mask_pixels, pixels, *sides[:2], 1, *sides[2:], *kind, generator)

    def put_back(pipe: Any, step: int, _timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        timesteps, before = pipe.scheduler.timesteps, kept
        if step < len(timesteps) - 1:
            before = pipe.scheduler.scale_noise(kept, timesteps[step + 1][None], noise)
        return values | {"latents": (1 - anew) * before + anew * values["latents"]}

    return put_back


def load_layered(folder: Path, dtype: torch.dtype) -> Stock:
    pipeline = layered_pipeline(folder, dtype)
    # Of a VAE of its own: the pipeline decodes in any case.
    pipeline.vae._encode = CausalCodec(type(pipeline.vae).from_pretrained(folder / "vae", torch_dtype=dtype)).encode
    return lambda params: {"latents": layered(pipeline, params)[0]}


def layered_pipeline(folder: Path, dtype: torch.dtype) -> QwenImageLayeredPipeline:
    """As the library makes it, without the processor that captions pictures."""
    return QwenImageLayeredPipeline.from_pretrained(folder, dtype=dtype, processor=None)


def layered(pipeline: QwenImageLayeredPipeline, params: ResolvedParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The stock latents and layers, in the size that is asked for instead of the picture's at a fixed area."""
    pipeline.set_progress_bar_config(disable=True)
    [media] = params.inputs
    size, steps = (params.width, params.height), []

    # It cannot give its latents as a result.
    def keep(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(values["latents"])
        return values

    with patch.object(pipeline_qwenimage_layered, "calculate_dimensions", lambda *_: size):
        [layers] = pipeline(
            image=Image.fromarray(decode_image(media, alpha=True)[0]),
            prompt=params.prompt,
            negative_prompt=params.negative_prompt,
            true_cfg_scale=params.guidance,
            layers=params.num_frames,
            num_inference_steps=params.steps,
            generator=torch.Generator().manual_seed(params.seed),
            output_type="pt",
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["latents"],
        ).images
    return steps[-1], layers


class PictureProcessor(Qwen2VLProcessor):
    """The library's processor without its video part, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None) -> None:
        super().__init__(image_processor, tokenizer)


def edit_pipeline(folder: Path, dtype: torch.dtype, pipeline: Any = QwenImageEditPipeline) -> Any:
    """As the library makes it."""
    processor = PictureProcessor(
        Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"),
        PreTrainedTokenizerFast.from_pretrained(folder / "processor"),
    )
    return pipeline.from_pretrained(folder, dtype=dtype, processor=processor)


def give_token_types(pipeline: QwenImageEditPipeline) -> None:
    """Gives the encoder what tells it rows and columns of a picture.

    transformers 5 needs `mm_token_type_ids` for it and the pipeline drops them (huggingface/diffusers issue 14194), so
    that patches are numbered like words; the model was trained with rows and columns.
    """
    forward: Callable = pipeline.text_encoder.forward
    mark = pipeline.text_encoder.config.image_token_id
    pipeline.text_encoder.forward = lambda input_ids, **others: forward(
        input_ids=input_ids, mm_token_type_ids=(input_ids == mark).int(), **others
    )


def edited(pipeline: QwenImageEditPipeline, folder: Path, params: ResolvedParams, **others) -> torch.Tensor:
    """The stock edit, with pictures of the area that the folder sets instead of the pipeline's fixed megapixel."""
    area_px = json.loads((folder / "model_index.json").read_text())["latent_area_px"]
    dimensions = pipeline_qwenimage_edit.calculate_dimensions
    [media] = params.inputs
    with patch.object(pipeline_qwenimage_edit, "calculate_dimensions", lambda _, ratio: dimensions(area_px, ratio)):
        return call(pipeline, params, image=Image.fromarray(decode_image(media)[0]), **others)


def call(pipeline, params: ResolvedParams, output_type: str = "latent", **others):
    """The pipeline's latents, or its pictures."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        true_cfg_scale=params.guidance,
        width=params.width,
        height=params.height,
        num_inference_steps=params.steps,
        generator=torch.Generator().manual_seed(params.seed),
        output_type=output_type,
        **others,
    ).images


EDIT_PLUS = OracleRow(
    family="qwen_image",
    variant="edit_plus",
    wishes=(
        wish("make it red", 1, 5, (64, 80), picture(90, 50, 1), picture(40, 60, 2)),
        wish("a photo of a large green square on a blue background", 2, 4, (96, 80), picture(64, 200, 2)),
        wish("dog", 3, 4, (64, 112), picture(31, 29, 3), picture(90, 50, 1), picture(64, 200, 2)),
    ),
    together=(
        wish("make it red", 1, 5, (64, 80), picture(90, 50, 1), picture(40, 60, 2)),
        wish(
            "a photo of a large green square on a blue background",
            2,
            4,
            (64, 80),
            picture(95, 51, 2),
            picture(41, 61, 5),
        ),
        wish("dog", 3, 4, (64, 80), picture(180, 100, 3), picture(80, 120, 6)),
    ),
    load_stock=load_edit_plus,
)
ROWS = (
    OracleRow(
        family="qwen_image",
        variant="t2i",
        wishes=(
            wish("a red circle", 1, 5, (64, 80)),
            wish("a photo of a large green square on a blue background", 2, 4, (96, 80)),
            wish("dog", 3, 4, (64, 112)),
        ),
        load_stock=load_t2i,
    ),
    OracleRow(
        family="qwen_image",
        variant="edit",
        wishes=(
            wish("make it red", 1, 5, (64, 80), picture(90, 50, 1)),
            wish("a photo of a large green square on a blue background", 2, 4, (96, 80), picture(64, 200, 2)),
            wish("dog", 3, 4, (64, 112), picture(31, 29, 3)),
        ),
        together=(
            wish("make it red", 1, 5, (64, 80), picture(90, 50, 1)),
            wish("a photo of a large green square on a blue background", 2, 4, (64, 80), picture(95, 51, 2)),
            wish("dog", 3, 4, (64, 80), picture(180, 100, 3)),
        ),
        load_stock=load_edit,
    ),
    EDIT_PLUS,
    replace(EDIT_PLUS, variant="edit_2511"),
    OracleRow(
        family="qwen_image",
        variant="t2i",
        name="qwen_image-t2i-mask",
        wishes=(
            wish("a red circle", 1, 5, (64, 80), picture(90, 50, 1), mask(90, 50, 4)),
            wish("a photo of a large green square", 2, 4, (96, 80), picture(64, 200, 2), mask(64, 200, 5)),
            wish("dog", 3, 4, (64, 112), picture(31, 29, 3), mask(31, 29, 6)),
        ),
        load_stock=load_masked,
    ),
    # The stock pipeline makes the size that it scales the picture to.
    OracleRow(
        family="qwen_image",
        variant="edit",
        name="qwen_image-edit-mask",
        wishes=(
            wish("make it red", 1, 5, (96, 64), picture(90, 60, 1), mask(90, 60, 4)),
            wish("a photo of a large green square", 2, 4, (64, 96), picture(70, 100, 2), mask(70, 100, 5)),
            wish("dog", 3, 4, (64, 64), picture(109, 110, 3), mask(109, 110, 6)),
        ),
        load_stock=load_masked_edit,
    ),
    OracleRow(
        family="qwen_image",
        variant="edit_plus",
        name="qwen_image-edit_plus-mask",
        wishes=(
            wish("make it red", 1, 5, (64, 80), picture(90, 50, 1), picture(40, 60, 2), mask(90, 50, 4)),
            wish("a photo of a large green square", 2, 4, (96, 80), picture(64, 200, 2), mask(64, 200, 5)),
            wish("dog", 3, 4, (64, 112), mask(31, 29, 6), picture(31, 29, 3), picture(90, 50, 1)),
        ),
        together=(
            wish("make it red", 1, 5, (64, 80), picture(90, 50, 1), picture(40, 60, 2), mask(90, 50, 4)),
            wish("a photo of a large green square", 2, 4, (64, 80), picture(95, 51, 2), picture(41, 61, 5)),
            wish("dog", 3, 4, (64, 80), picture(180, 100, 3), picture(80, 120, 6), mask(180, 100, 6)),
        ),
        load_stock=load_edit_plus,
    ),
    OracleRow(
        family="qwen_image",
        variant="layered",
        wishes=(
            replace(wish("a red circle", 1, 5, (64, 80), picture(90, 50, 1, 4)), num_frames=2),
            replace(wish("a photo of a large green square", 2, 4, (96, 80), picture(64, 200, 2)), num_frames=3),
            replace(wish("dog", 3, 4, (64, 112), picture(31, 29, 3, 4)), num_frames=1),
        ),
        load_stock=load_layered,
    ),
)
