"""FLUX's denoiser around its transformer: conditions, batches, guidance, steps.

Latents travel packed, [1, S, 4 C] with S = (H/16) (W/16), as the scheduler steps on them. `guidance` is the scale that
the dev model was distilled to follow: a number among its inputs. schnell has no such input, and `guidance` changes
nothing there. `guidance_2` is the scale of true classifier-free guidance; above 1 it adds the negative branch.
Shapes: B rows, S image tokens, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from services.attention import Attend
from services.errors import InvalidRequest, StartupError
from services.families.flux.attention import JOINT, JointAttention, rotary_factors
from services.families.flux.conditions import branches_of, text_conditions
from services.families.flux.cut import PLAN, Batch, blocks, embed, head
from services.families.flux.latents import PATCH, Grid, pack, unpack
from services.family import DenoiseState, DitModel, DitPart, Row, Tensors
from services.request import ResolvedParams
from services.weights import ModelSource

SCHEDULER = FlowMatchEulerDiscreteScheduler.__name__


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> DitModel:
    """Transformer and scheduler config; of the VAE only its config.

    Raises:
        StartupError: weights or a scheduler that cannot be served.
    """
    vae = source.config("vae")
    scheduler = source.config("scheduler", "scheduler_config.json")
    if scheduler.get("_class_name", SCHEDULER) != SCHEDULER:
        raise StartupError(f"{source.spec} has the scheduler {scheduler['_class_name']!r}: served is {SCHEDULER}")
    channels = vae.get("latent_channels", 4)
    transformer: Any = source.load(FluxTransformer2DModel, "transformer", device, dtype)
    if transformer.config.in_channels != channels * PATCH * PATCH:
        raise StartupError(
            f"{source.spec}: its transformer takes {transformer.config.in_channels} channels, but patches of its VAE's "
            f"latents have {channels * PATCH * PATCH}"
        )
    attend = Attend()
    transformer.set_attn_processor(JointAttention(attend))
    return DitModel(
        variant=source.variant,
        modules={"": transformer},
        attention={JOINT: attend},
        scheduler_class=FlowMatchEulerDiscreteScheduler,
        scheduler_config=scheduler,
        geometry={"channels": channels, "compression": 2 ** (len(vae["block_out_channels"]) - 1)},
        device=device,
        dtype=dtype,
    )


def prepare(model: DitModel, request_id: str, params: ResolvedParams, conditions: Tensors) -> DenoiseState:
    """Noise, schedule, conditions and positions of a request at step 0.

    Raises:
        InvalidRequest: conditions of another form.
    """
    conditioning = _conditioning(model, params, conditions)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(model.scheduler_config))
    grid = grid_of(model, params)
    sigmas = np.linspace(1.0, 1 / params.steps, params.steps)
    scheduler.set_timesteps(sigmas=sigmas, device=model.device, mu=_shift(scheduler, grid[0] * grid[1]))
    scheduler.set_begin_index(0)
    return DenoiseState(
        request_id=request_id,
        params=params,
        latents=_noise(model, params, grid),
        timesteps=scheduler.timesteps.cpu(),
        sigmas=scheduler.sigmas.cpu(),
        scheduler=scheduler,
        conditioning=conditioning,
        shared=_rotary(model, conditioning["positive"]["text"].shape[1], grid),
    )


def grid_of(model: DitModel, params: ResolvedParams) -> Grid:
    """Rows and columns of patches."""
    patch_px = model.geometry["compression"] * PATCH
    return params.height // patch_px, params.width // patch_px


def expert(_model: DitModel, _state: DenoiseState) -> str:
    """There is one transformer."""
    return ""


def branches(_model: DitModel, state: DenoiseState) -> tuple[str, ...]:
    """The negative one only under true classifier-free guidance."""
    return tuple(state.conditioning)


def batch_key(model: DitModel, state: DenoiseState) -> tuple[Any, ...]:
    """The picture's shape and the text's length; steps and guidance are free."""
    return *grid_of(model, state.params), state.conditioning["positive"]["text"].shape[1]


def collate(model: DitModel, rows: Sequence[Row]) -> Batch:
    """Rows to one batch, each with its own step's timestep and its own guidance."""
    first = rows[0].state
    steps = torch.stack([row.state.timesteps[row.state.step] for row in rows])
    guidance = None
    if _transformer(model).config.guidance_embeds:
        scales = [row.state.params.guidance for row in rows]
        guidance = torch.tensor(scales, dtype=torch.float32).to(model.device)
    return Batch(
        latents=torch.cat([row.state.latents for row in rows]),
        # The stock pipeline rounds the timestep to the latents' dtype before it divides.
        timestep=steps.to(model.device).to(first.latents.dtype) / 1000,
        guidance=guidance,
        text=torch.cat([row.state.conditioning[row.branch]["text"] for row in rows]),
        pooled=torch.cat([row.state.conditioning[row.branch]["pooled"] for row in rows]),
        rotary=(first.shared["text_rotary"], first.shared["image_rotary"]),
    )


def combine(_model: DitModel, state: DenoiseState, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """True classifier-free guidance, where it is on."""
    positive = predictions["positive"]
    if "negative" not in predictions:
        return positive
    negative = predictions["negative"]
    return negative + state.params.guidance_2 * (positive - negative)


def advance(_model: DitModel, state: DenoiseState, prediction: torch.Tensor) -> None:
    """One Euler step of the request's own scheduler."""
    timestep = state.scheduler.timesteps[state.step]
    state.latents = state.scheduler.step(prediction, timestep, state.latents, return_dict=False)[0]
    state.step += 1


def finish(_model: DitModel, state: DenoiseState) -> Tensors:
    """Packed latents, normalised."""
    return {"latents": state.latents}


def preview_latents(model: DitModel, state: DenoiseState, prediction: torch.Tensor) -> torch.Tensor:
    """x0 = x - sigma v, as [1, C, H/8, W/8]. `state` stands after the step that `prediction` made."""
    clean = state.latents - state.sigmas[state.step].to(state.latents.device, state.latents.dtype) * prediction
    return unpack(clean, grid_of(model, state.params))


def token_count(model: DitModel, params: ResolvedParams) -> int:
    """Image tokens of one row."""
    rows, columns = grid_of(model, params)
    return rows * columns


def example_conditions(model: DitModel, params: ResolvedParams, text_tokens: int) -> Tensors:
    """Random text for every branch."""
    config = _transformer(model).config
    example = {}
    for branch in branches_of(params):
        example[f"{branch}/text"] = torch.randn(1, text_tokens, config.joint_attention_dim)
        example[f"{branch}/pooled"] = torch.randn(1, config.pooled_projection_dim)
    return example


def _conditioning(model: DitModel, params: ResolvedParams, conditions: Tensors) -> dict[str, Tensors]:
    config = _transformer(model).config
    conditioning = {}
    for branch in branches_of(params):
        given = text_conditions(conditions, branch, config.joint_attention_dim, config.pooled_projection_dim)
        conditioning[branch] = {name: tensor.to(model.device, model.dtype) for name, tensor in given.items()}
    lengths = {branch: group["text"].shape[1] for branch, group in conditioning.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidRequest(f"the branches' texts have {lengths} tokens: they must have the same number")
    return conditioning


def _rotary(model: DitModel, text_tokens: int, grid: Grid) -> Tensors:
    """Factors of a request's positions, once for all its steps. Text stands at 0, patches at (0, row, column)."""
    places = torch.zeros(text_tokens + grid[0] * grid[1], 3, device=model.device)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    places[text_tokens:, 1:] = torch.stack((rows, columns), dim=-1).flatten(0, 1).to(places)
    factors = rotary_factors(*_transformer(model).pos_embed(places))
    return {"text_rotary": factors[:text_tokens], "image_rotary": factors[text_tokens:]}


def _noise(model: DitModel, params: ResolvedParams, grid: Grid) -> torch.Tensor:
    shape = (1, model.geometry["channels"], grid[0] * PATCH, grid[1] * PATCH)
    generator = torch.Generator("cpu").manual_seed(params.seed)
    return pack(torch.randn(shape, generator=generator, dtype=model.dtype, device="cpu").to(model.device))


def _shift(scheduler: Any, tokens: int) -> float:
    """mu of the exponential time shift: linear in the number of image tokens (arXiv 2403.03206, section 5.3.2).

    A scheduler without dynamic shifting, schnell's, takes no notice of it.
    """
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (top - base) / (high - low)
    return float(tokens * slope + (base - slope * low))


def _transformer(model: DitModel) -> Any:
    return model.modules[""]


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
