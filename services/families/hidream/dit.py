"""HiDream's denoiser around its transformer: conditions, batches, guidance, steps.

Latents are [1, C, h, w] in the weights' dtype. The full model steps with UniPC; the distilled ones jump to a clean
estimate and back to a lower noise level with fresh noise (FlowMatchLCMScheduler).
Shapes: B rows, S = (h / 2) (w / 2) image tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from services.attention import Attend
from services.errors import InvalidRequest, StartupError
from services.families.hidream.attention import JOINT, JointAttention
from services.families.hidream.conditions import TEXT_TOKENS, llama_layers, text_conditions
from services.families.hidream.cut import PLAN, Batch, blocks, embed, head
from services.families.hidream.moe import HiDreamTransformer
from services.family import DenoiseState, DitModel, DitPart, Row, Tensors
from services.request import ResolvedParams
from services.weights import ModelSource

SCHEDULERS = {
    cls.__name__: cls for cls in (UniPCMultistepScheduler, FlowMatchLCMScheduler, FlowMatchEulerDiscreteScheduler)
}


def load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> DitModel:
    """Transformer and scheduler config; of the VAE only its config.

    Raises:
        StartupError: a scheduler that is not served.
    """
    scheduler = source.config("scheduler", "scheduler_config.json")
    _check_scheduler(source, scheduler)
    transformer: Any = source.load(HiDreamTransformer, "transformer", device, dtype)
    attend = Attend()
    processor = JointAttention(attend)
    for block in blocks(transformer):
        if isinstance(block.module, PLAN.block_classes):  # not those that other ranks hold
            attention: Any = block.module.attn1
            attention.set_processor(processor)
    return DitModel(
        variant=source.variant,
        modules={"": transformer},
        attention={JOINT: attend},
        scheduler_class=SCHEDULERS[scheduler["_class_name"]],
        scheduler_config=scheduler,
        geometry={
            "channels": transformer.config.in_channels,
            "compression": 2 ** (len(source.config("vae")["block_out_channels"]) - 1),
        },
        device=device,
        dtype=dtype,
    )


def _check_scheduler(source: ModelSource, config: Mapping[str, Any]) -> None:
    name = config.get("_class_name", "")
    if name not in SCHEDULERS:
        raise StartupError(f"{source.spec} has the scheduler {name!r}: served are {', '.join(sorted(SCHEDULERS))}")
    if name == UniPCMultistepScheduler.__name__ and not (
        config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    ):
        raise StartupError(f"{source.spec}: its scheduler needs use_flow_sigmas and prediction_type flow_prediction")
    refused = ["scale_factors", "stochastic_sampling"]
    if name == UniPCMultistepScheduler.__name__:
        # The library gives this scheduler no shift to work with.
        refused.append("use_dynamic_shifting")
    for option in refused:
        if config.get(option):
            raise StartupError(f"{source.spec}: schedulers with {option} are not served")


def prepare(model: DitModel, request_id: str, params: ResolvedParams, conditions: Tensors) -> DenoiseState:
    """Noise, schedule and conditions of a request at step 0.

    Raises:
        InvalidRequest: conditions of another form, or a picture with more tokens than the model knows.
    """
    transformer = _transformer(model)
    tokens = token_count(model, params)
    if tokens > transformer.max_seq:
        raise InvalidRequest(
            f"{params.width}x{params.height} makes {tokens} tokens: at most {transformer.max_seq} are allowed",
            param="width",
        )
    conditioning = {
        branch: {
            name: tensor.to(model.device, model.dtype)
            for name, tensor in text_conditions(conditions, branch, transformer.config).items()
        }
        for branch in _branch_names(params)
    }
    scheduler = _scheduler(model, params.steps)
    generator = torch.Generator("cpu").manual_seed(params.seed)
    shape = (1, model.geometry["channels"], *latent_sides(model, params))
    return DenoiseState(
        request_id=request_id,
        params=params,
        latents=torch.randn(shape, generator=generator, dtype=model.dtype).to(model.device),
        timesteps=scheduler.timesteps.cpu(),
        sigmas=scheduler.sigmas.cpu(),
        scheduler=scheduler,
        conditioning=conditioning,
    )


def _scheduler(model: DitModel, steps: int) -> Any:
    scheduler = model.scheduler_class.from_config(dict(model.scheduler_config))
    # Where the shift depends on the number of tokens, this model counts its longest sequence for every picture.
    shift = {} if model.scheduler_class is UniPCMultistepScheduler else {"mu": _shift(_transformer(model).max_seq)}
    scheduler.set_timesteps(steps, device=model.device, **shift)
    scheduler.set_begin_index(0)
    return scheduler


def _shift(tokens: int) -> float:
    """mu of the exponential time shift: linear, 0.5 at 256 tokens and 1.15 at 4096 (arXiv 2403.03206, 5.3.2)."""
    slope = (1.15 - 0.5) / (4096 - 256)
    return tokens * slope + (0.5 - slope * 256)


def latent_sides(model: DitModel, params: ResolvedParams) -> tuple[int, int]:
    """Latent height and width."""
    compression = model.geometry["compression"]
    return params.height // compression, params.width // compression


def expert(_model: DitModel, _state: DenoiseState) -> str:
    """There is one transformer."""
    return ""


def branches(_model: DitModel, state: DenoiseState) -> tuple[str, ...]:
    """Both branches while guidance is on."""
    return tuple(state.conditioning)


def batch_key(model: DitModel, state: DenoiseState) -> tuple[Any, ...]:
    """Only the picture's shape: text has one length, steps are free."""
    return latent_sides(model, state.params)


def collate(model: DitModel, rows: Sequence[Row]) -> Batch:
    """Rows to one batch, each with its own step's timestep."""
    texts = [row.state.conditioning[row.branch] for row in rows]
    return Batch(
        latents=torch.cat([row.state.latents for row in rows]),
        timestep=torch.stack([row.state.timesteps[row.state.step] for row in rows]).to(model.device),
        **{name: torch.cat([text[name] for text in texts]) for name in ("t5", "llama", "pooled")},
    )


def combine(_model: DitModel, state: DenoiseState, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Classifier-free guidance of velocities, whose sign is the opposite of what the transformer predicts."""
    positive = -predictions["positive"]
    if "negative" not in predictions:
        return positive
    negative = -predictions["negative"]
    return negative + state.params.guidance * (positive - negative)


def advance(_model: DitModel, state: DenoiseState, prediction: torch.Tensor) -> None:
    """One step of the request's own scheduler."""
    fresh = isinstance(state.scheduler, FlowMatchLCMScheduler)
    noise = {"generator": step_noise(state.params.seed, state.step)} if fresh else {}
    timestep = state.scheduler.timesteps[state.step]
    state.latents = state.scheduler.step(prediction, timestep, state.latents, return_dict=False, **noise)[0]
    state.step += 1


def step_noise(seed: int, step: int) -> torch.Generator:
    """Where a step's fresh noise comes from. The stock pipeline takes it from a generator of the whole process.

    It follows from seed and step alone, so that a resumed request sees the same noise; the digest keeps the steps of
    neighbouring seeds apart.
    """
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def finish(_model: DitModel, state: DenoiseState) -> Tensors:
    """Normalised latents [1, C, h, w]."""
    return {"latents": state.latents}


def preview_latents(_model: DitModel, state: DenoiseState, prediction: torch.Tensor) -> torch.Tensor:
    """x0 = x - sigma v, as [1, C, h, w]. `state` stands after the step that `prediction` made."""
    return state.latents - float(state.sigmas[state.step]) * prediction


def token_count(model: DitModel, params: ResolvedParams) -> int:
    """Image tokens of one row."""
    height, width = latent_sides(model, params)
    side = _transformer(model).config.patch_size
    return int((height // side) * (width // side))


def example_conditions(model: DitModel, params: ResolvedParams, _text_tokens: int) -> Tensors:
    """Random text for every branch, as long as all text is."""
    config = _transformer(model).config
    shapes = {"t5": (1, TEXT_TOKENS, config.caption_channels[0]), "pooled": (1, config.text_emb_dim)}
    shapes |= {f"llama/{layer}": (1, TEXT_TOKENS, config.caption_channels[1]) for layer in llama_layers(config)}
    return {
        f"{branch}/{name}": torch.randn(shape) for branch in _branch_names(params) for name, shape in shapes.items()
    }


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
