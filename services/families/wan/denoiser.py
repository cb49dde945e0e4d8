"""Wan's denoiser around its transformer: conditions, batches, guidance, steps. One transformer or two experts.

Latents are [1, C, F, H, W] in fp32 whatever the weights' dtype, as the stock pipeline begins; a multistep scheduler
keeps its history in fp32 too. Text is 512 tokens long, zeros after the prompt: there is no mask, so all rows have the
same length. Models that start from pictures get their latents as more channels ("condition"), or, with a timestep for
each token, as the first frame itself. Shapes: B rows, S = F (H/2) (W/2) tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from services.attention import Attend
from services.errors import StartupError
from services.families.wan.attention import CROSS, SELF, WanProcessor
from services.families.wan.conditions import control_condition, latent_condition, picture_condition, text_condition
from services.families.wan.cut import PLAN, Batch, blocks, embed, head
from services.family import DenoiseState, DitModel, DitPart, Row, Tensors
from services.request import ResolvedParams
from services.weights import ModelSource

SCHEDULERS = {cls.__name__: cls for cls in (UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler)}
ONLY, HIGH_NOISE, LOW_NOISE = "", "high_noise", "low_noise"
# Of one picture: 16 x 16 patches and what stands for the whole.
PICTURE_TOKENS = 257


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> DitModel:
    """Transformers, scheduler config and the pipeline's settings; of the VAE only its config.

    Raises:
        StartupError: a scheduler that is not served.
    """
    settings, vae = source.settings(), source.config("vae")
    scheduler = source.config("scheduler", "scheduler_config.json")
    _check_scheduler(source, scheduler)
    ratio = settings.get("boundary_ratio")
    folders = {name: folder for name, folder in experts(source).items() if source.expert in ("", name)}
    cls = WanVACETransformer3DModel if source.variant.startswith("vace") else WanTransformer3DModel
    modules = {name: source.load(cls, folder, device, dtype) for name, folder in folders.items()}
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


def experts(source: ModelSource) -> Mapping[str, str]:
    """Two where the settings have a boundary between them."""
    if source.settings().get("boundary_ratio") is None:
        return {ONLY: "transformer"}
    return {HIGH_NOISE: "transformer", LOW_NOISE: "transformer_2"}


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
    scheduler = model.scheduler_class.from_config(dict(model.scheduler_config))
    scheduler.set_timesteps(params.steps, device=model.device)
    scheduler.set_begin_index(0)
    generator = torch.Generator("cpu").manual_seed(params.seed)
    given = _given(model, params, conditions)
    shape = list(_shape(model, params))
    if "control" in given:
        shape[2] = given["control"].shape[2]
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    return DenoiseState(
        request_id=request_id,
        params=params,
        latents=noise.to(model.device),
        timesteps=scheduler.timesteps.cpu(),
        sigmas=scheduler.sigmas.cpu(),
        scheduler=scheduler,
        conditioning={branch: _embeddings(model, conditions, branch) for branch in _branch_names(params)},
        shared=given,
    )


def _embeddings(model: DitModel, conditions: Tensors, branch: str) -> Tensors:
    config = _config(model)
    embeddings = {"text": text_condition(conditions, branch, config.text_dim)}
    if config.image_dim:
        tokens = config.pos_embed_seq_len or 0
        embeddings["pictures"] = picture_condition(conditions, branch, config.image_dim, tokens)
    return {name: tensor.to(model.device, model.dtype) for name, tensor in embeddings.items()}


def _given(model: DitModel, params: ResolvedParams, conditions: Tensors) -> Tensors:
    """What the clip starts from: "condition" beside the latents' channels, or a "first_frame" in their place.

    Or "control", which steers it; reference pictures are frames before its own.
    """
    config, shape = _config(model), _shape(model, params)
    if "vace_in_channels" in config:
        control = control_condition(conditions, config.vace_in_channels, shape[2:])
        return {"control": control.to(model.device, model.dtype)}
    if config.in_channels > config.out_channels:
        shape = (1, config.in_channels - config.out_channels, *shape[2:])
        return {"condition": latent_condition(conditions, "condition", shape).to(model.device, torch.float32)}
    if model.options["timestep_per_token"] and "first_frame" in conditions:
        shape = (*shape[:2], 1, *shape[3:])
        return {"first_frame": latent_condition(conditions, "first_frame", shape).to(model.device, torch.float32)}
    return {}


def _shape(model: DitModel, params: ResolvedParams) -> tuple[int, ...]:
    """Of the latents."""
    return 1, _config(model).out_channels, *latent_grid(model, params)


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
    """The clip's shape, and what the image encoder saw: text has one length, steps are free."""
    pictures = {group["pictures"].shape[1] for group in state.conditioning.values() if "pictures" in group}
    return *state.latents.shape[2:], *sorted(pictures)


def collate(model: DitModel, rows: Sequence[Row]) -> Batch:
    """Rows to one batch, each with its own step's timestep."""
    latents = torch.cat([_input(row.state) for row in rows]).to(model.dtype)
    timestep = torch.stack([row.state.timesteps[row.state.step] for row in rows]).to(model.device)
    if model.options["timestep_per_token"]:
        tokens = token_count(model, rows[0].state.params)
        timestep = timestep.to(torch.float32)[:, None].repeat(1, tokens)
        for row, times in zip(rows, timestep, strict=True):
            if "first_frame" in row.state.shared:
                # The first frame has no noise.
                times[: tokens // latents.shape[2]] = 0
    conditioning = [row.state.conditioning[row.branch] for row in rows]
    pictures = [group["pictures"] for group in conditioning if "pictures" in group]
    text = torch.cat([group["text"] for group in conditioning])
    control = [row.state.shared["control"] for row in rows if "control" in row.state.shared]
    return Batch(
        latents,
        timestep,
        text,
        pictures=torch.cat(pictures) if pictures else None,
        control=torch.cat(control) if control else None,
    )


def _input(state: DenoiseState) -> torch.Tensor:
    if "condition" in state.shared:
        return torch.cat([state.latents, state.shared["condition"]], dim=1)
    return _from_first_frame(state, state.latents)


def _from_first_frame(state: DenoiseState, latents: torch.Tensor) -> torch.Tensor:
    """The latents, behind the first frame where it is given."""
    if "first_frame" not in state.shared:
        return latents
    return torch.cat([state.shared["first_frame"], latents[:, :, 1:]], dim=2)


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
    if "first_frame" in state.shared:
        return {"latents": _from_first_frame(state, state.latents)}
    rounded = isinstance(state.scheduler, FlowMatchEulerDiscreteScheduler)
    latents = _without_references(model, state, state.latents)
    return {"latents": latents.to(model.dtype) if rounded else latents}


def _without_references(model: DitModel, state: DenoiseState, latents: torch.Tensor) -> torch.Tensor:
    frames, _, _ = latent_grid(model, state.params)
    return latents[:, :, -frames:]


def preview_latents(model: DitModel, state: DenoiseState, prediction: torch.Tensor) -> torch.Tensor:
    """x0 = x - sigma v, as [F, C, H, W]. `state` stands after the step that `prediction` made."""
    clean = _from_first_frame(state, state.latents - float(state.sigmas[state.step]) * prediction)
    return _without_references(model, state, clean)[0].transpose(0, 1)


def token_count(model: DitModel, params: ResolvedParams) -> int:
    """Tokens of one row."""
    sizes = zip(latent_grid(model, params), _config(model).patch_size, strict=True)
    return math.prod(int(size // patch) for size, patch in sizes)


def example_conditions(model: DitModel, params: ResolvedParams, text_tokens: int) -> Tensors:
    """Random text for every branch, and pictures where the model must have them."""
    config, shape = _config(model), _shape(model, params)
    example = {f"{branch}/text": torch.randn(1, text_tokens, config.text_dim) for branch in _branch_names(params)}
    if config.image_dim:
        tokens = config.pos_embed_seq_len or PICTURE_TOKENS
        example |= {f"{branch}/pictures": torch.randn(1, tokens, config.image_dim) for branch in _branch_names(params)}
    if config.in_channels > config.out_channels:
        example["condition"] = torch.randn(1, config.in_channels - config.out_channels, *shape[2:])
    if "vace_in_channels" in config:
        example["control"] = torch.randn(1, config.vace_in_channels, *shape[2:])
    return example


def _config(model: DitModel) -> Any:
    """Of any transformer: experts are alike."""
    transformer: Any = next(iter(model.modules.values()))
    return transformer.config


def _branch_names(params: ResolvedParams) -> tuple[str, ...]:
    # As in the stock pipeline, the first expert's scale turns guidance on for both.
    return ("positive", "negative") if params.guidance > 1 else ("positive",)


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
    experts=experts,
)
