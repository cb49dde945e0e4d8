"""Wan's denoiser, cut in three, for one transformer, two experts, and per-token timesteps.

Latents are [1, C, F, H, W] in fp32 whatever the weights' dtype, as the stock pipeline begins; a multistep scheduler
keeps its history in fp32 too. Text is 512 tokens long, zeros after the prompt: there is no mask, so all rows have the
same length. Shapes: B rows, S = F (H/2) (W/2) tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel, WanTransformerBlock
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import nn

from services.attention import Attend
from services.errors import InvalidRequest, StartupError
from services.families.wan.attention import CROSS, SELF, WanProcessor
from services.families.wan.text import MAX_TOKENS
from services.family import Block, DenoiseState, DitModel, DitPart, ModelPlan, Row, SequenceRegion, Tensors, Tokens
from services.request import ResolvedParams
from services.weights import ModelSource

SCHEDULERS = {cls.__name__: cls for cls in (UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler)}
ONLY, HIGH_NOISE, LOW_NOISE = "", "high_noise", "low_noise"

HIDDEN = ("hidden",)

# Query and key norms run over all heads at once. "temb" is the signal of published step caches.
PLAN = ModelPlan(
    block_classes=(WanTransformerBlock,),
    column=("blocks.*.attn[12].to_[qkv]", "blocks.*.ffn.net.0.proj"),
    row=("blocks.*.attn[12].to_out.0", "blocks.*.ffn.net.2"),
    gathered=("condition_embedder.*", "proj_out"),
    norms_across_heads=("blocks.*.attn[12].norm_[qk]",),
    attention=(SELF, CROSS),
    spread=(SELF,),
    sequence=(Tokens("hidden"), Tokens("rotary"), Tokens("temb", ndim=3), Tokens("modulation", ndim=4)),
    region=SequenceRegion(
        fields=(Tokens("hidden"), Tokens("modulation", ndim=4)),
        gathers={"blocks.*.attn[12]": {"hidden_states": HIDDEN}, "blocks.*.ffn": {"hidden_states": HIDDEN}},
        scatters={"blocks.*.attn[12].to_out.0": HIDDEN, "blocks.*.ffn.net.2": HIDDEN},
    ),
    fills_text=False,
    high_precision=("patch_embedding", "condition_embedder", "norm_out", "proj_out"),
    cache_signal="temb",
)


@dataclass(slots=True)
class Batch:
    """Rows of one forward: latents [B, C, F, H, W], text [B, 512, D], timestep [B] or, one a token, [B, S]."""

    latents: torch.Tensor
    timestep: torch.Tensor
    text: torch.Tensor


@dataclass(slots=True)
class WanStreams:
    """What the blocks pass on.

    `temb` is [B, D] and `modulation` [B, 6, D], or [B, S, D] and [B, S, 6, D]; `grid` counts patches (F, H, W).
    """

    hidden: torch.Tensor
    text: torch.Tensor
    temb: torch.Tensor
    modulation: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    grid: tuple[int, int, int]


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> DitModel:
    """Transformers, scheduler config and the pipeline's settings; of the VAE only its config.

    Raises:
        StartupError: a scheduler that is not served.
    """
    settings, vae = source.settings(), source.config("vae")
    scheduler = source.config("scheduler", "scheduler_config.json")
    _check_scheduler(source, scheduler)
    ratio = settings.get("boundary_ratio")
    folders = {ONLY: "transformer"} if ratio is None else {HIGH_NOISE: "transformer", LOW_NOISE: "transformer_2"}
    modules = {name: source.load(WanTransformer3DModel, folder, device, dtype) for name, folder in folders.items()}
    attention = {SELF: Attend(), CROSS: Attend()}
    processors = {kind: WanProcessor(attend) for kind, attend in attention.items()}
    for module in modules.values():
        for layer in module.modules():
            if isinstance(layer, WanAttention):
                layer.set_processor(processors[CROSS if layer.is_cross_attention else SELF])
    return DitModel(
        variant=source.variant,
        modules=modules,
        attention=attention,
        scheduler_class=SCHEDULERS[scheduler["_class_name"]],
        scheduler_config=scheduler,
        geometry={
            "compression": vae.get("scale_factor_spatial", 8),
            "frames_each": vae.get("scale_factor_temporal", 4),
        },
        device=device,
        dtype=dtype,
        options={
            "boundary": None if ratio is None else ratio * scheduler.get("num_train_timesteps", 1000),
            "timestep_per_token": bool(settings.get("expand_timesteps")),
        },
    )


def _check_scheduler(source: ModelSource, config: Mapping[str, Any]) -> None:
    name = config.get("_class_name", "")
    if name not in SCHEDULERS:
        raise StartupError(f"{source.spec} has the scheduler {name!r}: served are {', '.join(sorted(SCHEDULERS))}")
    if name == UniPCMultistepScheduler.__name__ and not (
        config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    ):
        raise StartupError(f"{source.spec}: its scheduler needs use_flow_sigmas and prediction_type flow_prediction")
    if config.get("use_dynamic_shifting"):
        raise StartupError(f"{source.spec}: its scheduler has use_dynamic_shifting, which gives no shift for clips")


def prepare(model: DitModel, request_id: str, params: ResolvedParams, conditions: Tensors) -> DenoiseState:
    """Noise, schedule and conditions of a request at step 0."""
    config = _config(model)
    conditioning = {
        branch: {"text": _text_condition(conditions, branch, config.text_dim).to(model.device, model.dtype)}
        for branch in _branch_names(params)
    }
    scheduler = model.scheduler_class.from_config(dict(model.scheduler_config))
    scheduler.set_timesteps(params.steps, device=model.device)
    scheduler.set_begin_index(0)
    generator = torch.Generator("cpu").manual_seed(params.seed)
    noise = torch.randn((1, config.in_channels, *latent_grid(model, params)), generator=generator, dtype=torch.float32)
    return DenoiseState(
        request_id=request_id,
        params=params,
        latents=noise.to(model.device),
        timesteps=scheduler.timesteps.cpu(),
        sigmas=scheduler.sigmas.cpu(),
        scheduler=scheduler,
        conditioning=conditioning,
    )


def latent_grid(model: DitModel, params: ResolvedParams) -> tuple[int, int, int]:
    """Latent (frames, height, width)."""
    side = model.geometry["compression"]
    return (params.num_frames - 1) // model.geometry["frames_each"] + 1, params.height // side, params.width // side


def expert(model: DitModel, state: DenoiseState) -> str:
    """The high-noise expert down to the boundary, then the low-noise one."""
    boundary = model.options["boundary"]
    if boundary is None:
        return ONLY
    return HIGH_NOISE if bool(state.timesteps[state.step] >= boundary) else LOW_NOISE


def branches(_model: DitModel, state: DenoiseState) -> tuple[str, ...]:
    """Both branches while guidance is on."""
    return tuple(state.conditioning)


def batch_key(model: DitModel, state: DenoiseState) -> tuple[Any, ...]:
    """Only the clip's shape: text has one length, steps are free."""
    return latent_grid(model, state.params)


def collate(model: DitModel, rows: Sequence[Row]) -> Batch:
    """Rows to one batch, each with its own step's timestep."""
    latents = torch.cat([row.state.latents for row in rows]).to(model.dtype)
    timestep = torch.stack([row.state.timesteps[row.state.step] for row in rows]).to(model.device)
    if model.options["timestep_per_token"]:
        tokens = token_count(model, rows[0].state.params)
        timestep = timestep.to(torch.float32)[:, None].expand(-1, tokens)
    text = torch.cat([row.state.conditioning[row.branch]["text"] for row in rows])
    return Batch(latents, timestep, text)


def embed(module: nn.Module, batch: Batch) -> WanStreams:
    """As WanTransformer3DModel.forward up to its blocks."""
    model: Any = module
    hidden = model.patch_embedding(batch.latents)
    _, _, frames, rows, columns = hidden.shape
    tokens = batch.timestep.shape[1] if batch.timestep.ndim == 2 else None
    temb, modulation, text, _ = model.condition_embedder(
        batch.timestep.flatten(), batch.text, None, timestep_seq_len=tokens
    )
    return WanStreams(
        hidden=hidden.flatten(2).transpose(1, 2).contiguous(),
        text=text,
        temb=temb,
        modulation=modulation.unflatten(-1, (6, -1)),
        rotary=model.rope(batch.latents),
        grid=(frames, rows, columns),
    )


def blocks(module: nn.Module) -> Sequence[Block]:
    """The transformer's own blocks."""
    model: Any = module
    return [_block(f"blocks.{index}", block) for index, block in enumerate(model.blocks)]


def _block(name: str, block: Any) -> Block:
    def run(streams: WanStreams) -> WanStreams:
        # `forward`, not `__call__`: a feature may have rebound it, and nothing here hangs on hooks.
        hidden = block.forward(streams.hidden, streams.text, streams.modulation, streams.rotary)
        return replace(streams, hidden=hidden)

    return Block(name, block, run)


def head(module: nn.Module, streams: WanStreams) -> torch.Tensor:
    """Velocity [B, C, F, H, W]."""
    model: Any = module
    temb = streams.temb if streams.temb.ndim == 3 else streams.temb[:, None]
    shift, scale = (model.scale_shift_table + temb[..., None, :]).unbind(-2)
    hidden = (model.norm_out(streams.hidden.float()) * (1 + scale) + shift).type_as(streams.hidden)
    patches = model.proj_out(hidden).unflatten(1, streams.grid).unflatten(-1, (*model.config.patch_size, -1))
    # [B, F, H, W, pF, pH, pW, C]: every patch goes back to its place.
    prediction: torch.Tensor = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return prediction


def combine(model: DitModel, state: DenoiseState, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Classifier-free guidance with the scale of the step's expert."""
    positive = predictions["positive"]
    if "negative" not in predictions:
        return positive
    negative = predictions["negative"]
    low_noise = expert(model, state) == LOW_NOISE
    return negative + (state.params.guidance_2 if low_noise else state.params.guidance) * (positive - negative)


def advance(_model: DitModel, state: DenoiseState, prediction: torch.Tensor) -> None:
    """One step of the request's own scheduler."""
    timestep = state.scheduler.timesteps[state.step]
    latents = state.scheduler.step(prediction, timestep, state.latents, return_dict=False)[0]
    # The Euler scheduler rounds to the prediction's dtype. In fp32 the values are the same, and every step's latents
    # have one dtype: rows of different steps can share a batch, and a checkpoint fits.
    state.latents = latents.to(torch.float32)
    state.step += 1


def finish(model: DitModel, state: DenoiseState) -> Tensors:
    """Normalised latents [1, C, F, H, W], in the dtype that the scheduler leaves."""
    rounded = isinstance(state.scheduler, FlowMatchEulerDiscreteScheduler)
    return {"latents": state.latents.to(model.dtype) if rounded else state.latents}


def preview_latents(_model: DitModel, state: DenoiseState, prediction: torch.Tensor) -> torch.Tensor:
    """x0 = x - sigma v, as [F, C, H, W]. `state` stands after the step that `prediction` made."""
    clean = state.latents - float(state.sigmas[state.step]) * prediction
    return clean[0].transpose(0, 1)


def token_count(model: DitModel, params: ResolvedParams) -> int:
    """Tokens of one row."""
    sizes = zip(latent_grid(model, params), _config(model).patch_size, strict=True)
    return math.prod(int(size // patch) for size, patch in sizes)


def example_conditions(model: DitModel, params: ResolvedParams, text_tokens: int) -> Tensors:
    """Random text for every branch."""
    width = _config(model).text_dim
    return {f"{branch}/text": torch.randn(1, text_tokens, width) for branch in _branch_names(params)}


def _config(model: DitModel) -> Any:
    """Of any transformer: experts are alike."""
    transformer: Any = next(iter(model.modules.values()))
    return transformer.config


def _branch_names(params: ResolvedParams) -> tuple[str, ...]:
    # As in the stock pipeline, the first expert's scale turns guidance on for both.
    return ("positive", "negative") if params.guidance > 1 else ("positive",)


def _text_condition(conditions: Tensors, branch: str, width: int) -> torch.Tensor:
    """[1, 512, width]: zeros after the prompt's own tokens."""
    name = f"{branch}/text"
    if name not in conditions:
        raise InvalidRequest(f"the condition {name!r} is missing: there are {', '.join(sorted(conditions)) or 'none'}")
    text = conditions[name]
    if text.ndim != 3 or text.shape[0] != 1 or not 1 <= text.shape[1] <= MAX_TOKENS or text.shape[2] != width:
        raise InvalidRequest(
            f"the condition {name!r} has the shape {list(text.shape)}: it must be [1, T, {width}], T <= {MAX_TOKENS}"
        )
    if not text.is_floating_point():
        raise InvalidRequest(f"the condition {name!r} has dtype {text.dtype}: it must be a floating-point type")
    return nn.functional.pad(text, (0, 0, 0, MAX_TOKENS - text.shape[1]))


DENOISER = DitPart(
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
