"""Qwen-Image's denoiser around its transformer: conditions, batches, guidance, steps. For text alone and for edits.

Source of the model: arXiv 2508.02324. Latents travel packed, [1, S, 4 C] with S = (H/16) (W/16), as the scheduler
steps on them. Input pictures follow the picture's own tokens in the sequence and never change.
Shapes: B rows, S image tokens, T text tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn

from services.attention import Attend
from services.errors import InvalidRequest, StartupError
from services.families.qwen_image.attention import JOINT, JointAttention
from services.families.qwen_image.conditions import mask_conditions, picture_conditions, text_condition
from services.families.qwen_image.cut import PLAN, Batch, Grid, blocks, embed, head
from services.families.qwen_image.latents import PATCH, pack, unpack
from services.families.qwen_image.recipes import Recipe, recipe_of
from services.family import DenoiseState, DitModel, DitPart, Row, Tensors
from services.request import ResolvedParams
from services.weights import ModelSource

# Of a picture of 256 x 256 pixels.
BASE_TOKENS = 256


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> DitModel:
    """Transformer and scheduler config; of the VAE only its config.

    Raises:
        StartupError: weights that cannot be served.
    """
    transformer: Any = source.load(QwenImageTransformer2DModel, "transformer", device, dtype)
    recipe = recipe_of(source)
    options = {"use_additional_t_cond": recipe.layers, "use_layer3d_rope": recipe.layers}
    for option, wanted in (options | {"zero_cond_t": recipe.still_pictures}).items():
        if bool(transformer.config.get(option)) != wanted:
            raise StartupError(f"{source.spec}: {option} does not fit a model that makes {source.variant}")
    attend = Attend()
    transformer.set_attn_processor(JointAttention(attend))
    vae = source.config("vae")
    geometry = {
        "channels": vae.get("z_dim", 16),
        "compression": 2 ** len(vae.get("temperal_downsample", (False, True, True))),
    }
    return DitModel(
        variant=source.variant,
        modules={"": transformer},
        attention={JOINT: attend},
        scheduler_class=FlowMatchEulerDiscreteScheduler,
        scheduler_config=source.config("scheduler", "scheduler_config.json"),
        geometry=geometry,
        device=device,
        dtype=dtype,
        options={"recipe": recipe},
    )


def prepare(model: DitModel, request_id: str, params: ResolvedParams, conditions: Tensors) -> DenoiseState:
    """Noise, schedule and conditions of a request at step 0.

    Raises:
        InvalidRequest: conditions of another form, or a single step.
    """
    grid = grid_of(model, params)
    width = _transformer(model).config.joint_attention_dim
    conditioning = {
        branch: {"text": text_condition(conditions, branch, width).to(model.device, model.dtype)}
        for branch in _branch_names(params)
    }
    shared: Tensors = {}
    if model.options["recipe"].takes_pictures:
        shared = picture_conditions(conditions, model.geometry["channels"])
        shared["pictures"] = shared["pictures"].to(model.device, model.dtype)
        if model.options["recipe"].layers and shared["picture_grids"].tolist() != [[1, *grid[1:]]]:
            raise InvalidRequest("the latents of the picture to take apart have not the size of its layers")
    noise = _noise(model, params, grid)
    if masked := mask_conditions(conditions, model.geometry["channels"], grid):
        shared |= {name: tensor.to(model.device, model.dtype) for name, tensor in masked.items()} | {"noise": noise}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(model.scheduler_config))
    if params.steps < 2 and scheduler.config.shift_terminal:
        # The schedule is stretched so that its last noise level is shift_terminal; one level cannot be both ends.
        raise InvalidRequest("steps is 1: this model's schedule needs at least 2", param="steps")
    sigmas = np.linspace(1.0, 1 / params.steps, params.steps)
    if model.options["recipe"].layers:
        # By the side of a layer, in units of 256 pixels.
        mu = (grid[1] * grid[2] / BASE_TOKENS) ** 0.5
    else:
        mu = _shift(scheduler, grid[1] * grid[2])
    scheduler.set_timesteps(sigmas=sigmas, device=model.device, mu=mu)
    scheduler.set_begin_index(0)
    state = DenoiseState(
        request_id=request_id,
        params=params,
        latents=noise,
        timesteps=scheduler.timesteps.cpu(),
        sigmas=scheduler.sigmas.cpu(),
        scheduler=scheduler,
        conditioning=conditioning,
        shared=shared,
    )
    _check_positions(model, state)
    return state


def grid_of(model: DitModel, params: ResolvedParams) -> Grid:
    """Of the picture that is made; of one that is taken apart, the whole and its layers."""
    patch_px = _patch_px(model)
    pictures = 1 + params.num_frames if model.options["recipe"].layers else 1
    return pictures, params.height // patch_px, params.width // patch_px


def expert(_model: DitModel, _state: DenoiseState) -> str:
    """There is one transformer."""
    return ""


def branches(_model: DitModel, state: DenoiseState) -> tuple[str, ...]:
    """Both branches while guidance is on."""
    return tuple(state.conditioning)


def batch_key(model: DitModel, state: DenoiseState) -> tuple[Any, ...]:
    """Only the pictures' shapes: texts are filled up, steps are free."""
    return _grids(model, state)


def collate(model: DitModel, rows: Sequence[Row]) -> Batch:
    """Rows to one batch; shorter texts get zeros in front, which attention passes over."""
    first = rows[0].state
    texts = [row.state.conditioning[row.branch]["text"] for row in rows]
    longest = max(text.shape[1] for text in texts)
    missing = [longest - text.shape[1] for text in texts]
    if any(missing):
        texts = [nn.functional.pad(text, (0, 0, zeros, 0)) for text, zeros in zip(texts, missing, strict=True)]
    # The stock pipeline rounds the timestep to the latents' dtype before it divides.
    steps = torch.stack([row.state.timesteps[row.state.step] for row in rows])
    latents = torch.cat([row.state.latents for row in rows])
    if "pictures" in first.shared:
        latents = torch.cat([latents, torch.cat([row.state.shared["pictures"] for row in rows])], dim=1)
    return Batch(
        latents=latents,
        timestep=steps.to(model.device).to(first.latents.dtype) / 1000,
        text=torch.cat(texts),
        filling=torch.tensor(missing) if any(missing) else None,
        grids=_grids(model, first),
        num_image_tokens=first.latents.shape[1],
    )


def combine(model: DitModel, state: DenoiseState, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """True classifier-free guidance; but for layers, rescaled to the conditional prediction's norm for every token."""
    positive = predictions["positive"]
    if "negative" not in predictions:
        return positive
    negative = predictions["negative"]
    combined = negative + state.params.guidance * (positive - negative)
    if model.options["recipe"].layers:
        return combined
    norm = torch.norm(positive, dim=-1, keepdim=True)
    rescaled: torch.Tensor = combined * (norm / torch.norm(combined, dim=-1, keepdim=True))
    return rescaled


def advance(_model: DitModel, state: DenoiseState, prediction: torch.Tensor) -> None:
    """One Euler step of the request's own scheduler; what a mask keeps is put back, as noisy as the rest."""
    timestep = state.scheduler.timesteps[state.step]
    stepped = state.scheduler.step(prediction, timestep, state.latents, return_dict=False)[0]
    state.step += 1
    state.latents = _with_kept(state, stepped, state.sigmas[state.step])


def _with_kept(state: DenoiseState, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The latents where the mask says that they are made anew, else those of the picture at that noise level."""
    if "anew" not in state.shared:
        return latents
    kept, anew, noise = (state.shared[name] for name in ("kept", "anew", "noise"))
    # It stays on the CPU: a single number is an argument of the kernel, and nothing waits for it.
    sigma = sigma.to(latents.dtype)
    return (1 - anew) * (sigma * noise + (1.0 - sigma) * kept) + anew * latents


def finish(_model: DitModel, state: DenoiseState) -> Tensors:
    """Packed latents, normalised."""
    return {"latents": state.latents}


def preview_latents(model: DitModel, state: DenoiseState, prediction: torch.Tensor) -> torch.Tensor:
    """x0 = x - sigma v, as [F, C, H/8, W/8]. `state` stands after the step that `prediction` made."""
    clean = state.latents - state.sigmas[state.step].to(state.latents.device, state.latents.dtype) * prediction
    clean = _with_kept(state, clean, state.sigmas.new_zeros(()))
    return unpack(clean, grid_of(model, state.params))[0].transpose(0, 1)


def token_count(model: DitModel, params: ResolvedParams) -> int:
    """Image tokens of one row; an input picture counts with its area."""
    frames, rows, columns = grid_of(model, params)
    recipe: Recipe = model.options["recipe"]
    return frames * rows * columns + recipe.latent_area_px // _patch_px(model) ** 2


def example_conditions(model: DitModel, params: ResolvedParams, text_tokens: int) -> Tensors:
    """Random text for every branch; the negative one is shorter, so that a batch has padding."""
    width = _transformer(model).config.joint_attention_dim
    lengths = {"positive": text_tokens, "negative": max(1, text_tokens // 2)}
    example = {f"{branch}/text": torch.randn(1, lengths[branch], width) for branch in _branch_names(params)}
    recipe: Recipe = model.options["recipe"]
    if recipe.takes_pictures:
        side = max(1, round(math.sqrt(recipe.latent_area_px) / _patch_px(model)))
        rows, columns = grid_of(model, params)[1:] if recipe.layers else (side, side)
        example["image/0"] = torch.randn(1, model.geometry["channels"], PATCH * rows, PATCH * columns)
    return example


def _grids(model: DitModel, state: DenoiseState) -> tuple[Grid, ...]:
    inputs = state.shared["picture_grids"].tolist() if "picture_grids" in state.shared else []
    pictures, rows, columns = grid_of(model, state.params)
    return *[(1, rows, columns)] * pictures, *(tuple(grid) for grid in inputs)


def _check_positions(model: DitModel, state: DenoiseState) -> None:
    """The table of rotary factors ends somewhere; text comes after the largest picture's half side."""
    positions = len(_transformer(model).pos_embed.pos_freqs)
    first = max(side // 2 for grid in _grids(model, state) for side in grid)
    longest = max(group["text"].shape[1] for group in state.conditioning.values())
    if first + longest > positions:
        raise InvalidRequest(f"the text has {longest} tokens: at most {positions - first} fit", param="prompt")


def _noise(model: DitModel, params: ResolvedParams, grid: tuple[int, int, int]) -> torch.Tensor:
    pictures, rows, columns = grid
    shape = (pictures, model.geometry["channels"], rows * PATCH, columns * PATCH)
    generator = torch.Generator("cpu").manual_seed(params.seed)
    noise = torch.randn(shape, generator=generator, dtype=model.dtype, device="cpu").to(model.device)
    return pack(noise).flatten(0, 1)[None]


def _shift(scheduler: Any, tokens: int) -> float:
    """mu of the exponential time shift: linear in the number of image tokens (arXiv 2403.03206, section 5.3.2)."""
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (top - base) / (high - low)
    return float(tokens * slope + (base - slope * low))


def _patch_px(model: DitModel) -> int:
    compression: int = model.geometry["compression"]
    return compression * PATCH


def _transformer(model: DitModel) -> Any:
    return model.modules[""]


def _branch_names(params: ResolvedParams) -> tuple[str, ...]:
    return ("positive", "negative") if params.guidance > 1 else ("positive",)


DIT = DitPart(
    load=load,
    plan=PLAN,
    prepare=prepare,
    expert=expert,
    branches=branches,
    batch_key=batch_key,
    collate=collate,
    embed=embed,
    blocks=blocks,
    head=head,
    combine=combine,
    advance=advance,
    finish=finish,
    preview_latents=preview_latents,
    token_count=token_count,
    example_conditions=example_conditions,
)
