"""Qwen-Image: text-to-image. Model and scheduler classes are those of diffusers; the cut is ours.

Source of the model: arXiv 2508.02324. Latents travel packed, [1, S, 4 C] with S = (H/16) (W/16), as the scheduler
steps on them. Shapes: B rows, S image tokens, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel, QwenImageTransformerBlock
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn

from services.errors import InvalidRequest
from services.families.qwen_image.presets import PRESETS, VARIANTS
from services.families.qwen_image.text import TEXT
from services.families.qwen_image.tiny import tiny
from services.family import (
    Block,
    DenoiseState,
    DitModel,
    DitPart,
    Family,
    Frames,
    ModelPlan,
    Row,
    Tensors,
    VaePart,
)
from services.request import ResolvedParams
from services.single_frame import use_2d
from services.weights import ModelSource

PATCH = 2


@dataclass(slots=True)
class Batch:
    """Rows of one forward. `mask` [B, T] is None for one row, which has no padding."""

    latents: torch.Tensor
    timestep: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor | None
    image_shapes: tuple[tuple[int, int, int], ...]
    num_image_tokens: int


@dataclass(slots=True)
class QwenStreams:
    """What the blocks pass on: image stream, text stream, modulation, rotary factors."""

    hidden: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor | None
    temb: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    num_image_tokens: int


# ---- Denoiser ------------------------------------------------------------------------------------------------------


def load_dit(source: ModelSource, device: torch.device, dtype: torch.dtype) -> DitModel:
    """Transformer and scheduler config; of the VAE only its config."""
    transformer = source.load(QwenImageTransformer2DModel, "transformer", device, dtype)
    vae = source.config("vae")
    geometry = {
        "channels": vae.get("z_dim", 16),
        "compression": 2 ** len(vae.get("temperal_downsample", (False, True, True))),
    }
    return DitModel(
        variant=source.variant,
        modules={"": transformer},
        scheduler_class=FlowMatchEulerDiscreteScheduler,
        scheduler_config=source.config("scheduler", "scheduler_config.json"),
        geometry=geometry,
        device=device,
        dtype=dtype,
    )


# Joint attention under a text mask: prompts of any length share a batch.
PLAN = ModelPlan(
    block_classes=(QwenImageTransformerBlock,),
    column=("*.attn.to_q", "*.attn.to_k", "*.attn.to_v", "*.attn.add_[qkv]_proj", "*.net.0.proj"),
    row=("*.attn.to_out.0", "*.attn.to_add_out", "*.net.2"),
    attention=("transformer_blocks.*.attn",),
    has_text_mask=True,
    high_precision=("time_text_embed", "norm_out", "proj_out"),
    cache_signal="modulated",
)


def prepare(model: DitModel, request_id: str, params: ResolvedParams, conditions: Tensors) -> DenoiseState:
    """Noise, schedule and conditions of a request at step 0."""
    grid = grid_of(model, params)
    width = _transformer(model).config.joint_attention_dim
    conditioning = {
        branch: {"text": _text_condition(conditions, branch, width).to(model.device, model.dtype)}
        for branch in _branch_names(params)
    }
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(model.scheduler_config))
    if params.steps < 2 and scheduler.config.shift_terminal:
        # The schedule is stretched so that its last noise level is shift_terminal; one level cannot be both ends.
        raise InvalidRequest("steps is 1: this model's schedule needs at least 2", param="steps")
    sigmas = np.linspace(1.0, 1 / params.steps, params.steps)
    scheduler.set_timesteps(sigmas=sigmas, device=model.device, mu=_shift(scheduler, grid[1] * grid[2]))
    scheduler.set_begin_index(0)
    return DenoiseState(
        request_id=request_id,
        params=params,
        latents=_noise(model, params, grid),
        timesteps=scheduler.timesteps.cpu(),
        sigmas=scheduler.sigmas.cpu(),
        scheduler=scheduler,
        conditioning=conditioning,
    )


def grid_of(model: DitModel, params: ResolvedParams) -> tuple[int, int, int]:
    """(frames, rows, columns) of patches."""
    patch_px = model.geometry["compression"] * PATCH
    return 1, params.height // patch_px, params.width // patch_px


def expert(_model: DitModel, _state: DenoiseState) -> str:
    """There is one transformer."""
    return ""


def branches(_model: DitModel, state: DenoiseState) -> tuple[str, ...]:
    """Both branches while guidance is on."""
    return tuple(state.conditioning)


def batch_key(model: DitModel, state: DenoiseState) -> tuple[Any, ...]:
    """Only the picture's shape: text length is masked, steps are free."""
    return grid_of(model, state.params)


def collate(model: DitModel, rows: Sequence[Row]) -> Batch:
    """Rows to one batch; text is padded with zeros under a mask."""
    first = rows[0].state
    texts = [row.state.conditioning[row.branch]["text"] for row in rows]
    mask = None
    if len(rows) > 1:
        lengths = torch.tensor([text.shape[1] for text in texts])
        longest = int(lengths.max())
        mask = (torch.arange(longest) < lengths[:, None]).to(model.device)
        texts = [nn.functional.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts]
    # The stock pipeline rounds the timestep to the latents' dtype before it divides.
    steps = torch.stack([row.state.timesteps[row.state.step] for row in rows])
    return Batch(
        latents=torch.cat([row.state.latents for row in rows]),
        timestep=steps.to(model.device).to(first.latents.dtype) / 1000,
        text=torch.cat(texts),
        mask=mask,
        image_shapes=(grid_of(model, first.params),),
        num_image_tokens=first.latents.shape[1],
    )


def embed(module: nn.Module, batch: Batch) -> QwenStreams:
    """As QwenImageTransformer2DModel.forward up to its blocks."""
    model: Any = module
    hidden = model.img_in(batch.latents)
    timestep = batch.timestep.to(hidden.dtype)
    text = model.txt_in(model.txt_norm(batch.text))
    return QwenStreams(
        hidden=hidden,
        text=text,
        mask=batch.mask,
        temb=model.time_text_embed(timestep, hidden),
        rotary=model.pos_embed([list(batch.image_shapes)], max_txt_seq_len=text.shape[1], device=hidden.device),
        num_image_tokens=batch.num_image_tokens,
    )


def blocks(module: nn.Module) -> Sequence[Block]:
    """The transformer's own blocks."""
    model: Any = module
    return [_block(f"transformer_blocks.{index}", block) for index, block in enumerate(model.transformer_blocks)]


def _block(name: str, block: Any) -> Block:
    def run(streams: QwenStreams) -> QwenStreams:
        # `forward`, not `__call__`: a feature may have rebound it, and nothing here hangs on hooks.
        text, hidden = block.forward(
            hidden_states=streams.hidden,
            encoder_hidden_states=streams.text,
            encoder_hidden_states_mask=streams.mask,
            temb=streams.temb,
            image_rotary_emb=streams.rotary,
        )
        return QwenStreams(hidden, text, streams.mask, streams.temb, streams.rotary, streams.num_image_tokens)

    return Block(name, block, run)


def head(module: nn.Module, streams: QwenStreams) -> torch.Tensor:
    """Velocity [B, S, 4 C] of the picture's own tokens."""
    model: Any = module
    prediction: torch.Tensor = model.proj_out(model.norm_out(streams.hidden, streams.temb))
    return prediction[:, : streams.num_image_tokens]


def combine(_model: DitModel, state: DenoiseState, predictions: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """True classifier-free guidance, rescaled to the conditional prediction's norm for every token."""
    positive = predictions["positive"]
    if "negative" not in predictions:
        return positive
    negative = predictions["negative"]
    combined = negative + state.params.guidance * (positive - negative)
    norm = torch.norm(positive, dim=-1, keepdim=True)
    rescaled: torch.Tensor = combined * (norm / torch.norm(combined, dim=-1, keepdim=True))
    return rescaled


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
    return unpack(clean, grid_of(model, state.params))[:, :, 0]


def token_count(model: DitModel, params: ResolvedParams) -> int:
    """Image tokens of one row."""
    frames, rows, columns = grid_of(model, params)
    return frames * rows * columns


def example_conditions(model: DitModel, params: ResolvedParams, text_tokens: int) -> Tensors:
    """Random text for every branch; the negative one is shorter, so that a batch has padding."""
    width = _transformer(model).config.joint_attention_dim
    lengths = {"positive": text_tokens, "negative": max(1, text_tokens // 2)}
    return {f"{branch}/text": torch.randn(1, lengths[branch], width) for branch in _branch_names(params)}


def unpack(latents: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """[B, S, 4 C] -> [B, C, 1, H/8, W/8], as the pipeline unpacks."""
    _, rows, columns = grid
    batch, _, width = latents.shape
    spread = latents.view(batch, rows, columns, width // 4, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return spread.reshape(batch, width // 4, 1, rows * PATCH, columns * PATCH)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, H/8, W/8] -> [B, S, 4 C]."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // PATCH) * (width // PATCH), channels * 4)


def _noise(model: DitModel, params: ResolvedParams, grid: tuple[int, int, int]) -> torch.Tensor:
    _, rows, columns = grid
    shape = (1, 1, model.geometry["channels"], rows * PATCH, columns * PATCH)
    generator = torch.Generator("cpu").manual_seed(params.seed)
    noise = torch.randn(shape, generator=generator, dtype=model.dtype, device="cpu").to(model.device)
    return pack(noise[:, 0])


def _shift(scheduler: Any, tokens: int) -> float:
    """mu of the exponential time shift: linear in the number of image tokens (arXiv 2403.03206, section 5.3.2)."""
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (top - base) / (high - low)
    return float(tokens * slope + (base - slope * low))


def _transformer(model: DitModel) -> Any:
    return model.modules[""]


def _branch_names(params: ResolvedParams) -> tuple[str, ...]:
    return ("positive", "negative") if params.guidance > 1 else ("positive",)


def _text_condition(conditions: Tensors, branch: str, width: int) -> torch.Tensor:
    name = f"{branch}/text"
    if name not in conditions:
        raise InvalidRequest(f"the condition {name!r} is missing: there are {', '.join(sorted(conditions)) or 'none'}")
    text = conditions[name]
    if text.ndim != 3 or text.shape[0] != 1 or text.shape[1] < 1 or text.shape[2] != width:
        raise InvalidRequest(f"the condition {name!r} has the shape {list(text.shape)}: it must be [1, T, {width}]")
    if not text.is_floating_point():
        raise InvalidRequest(f"the condition {name!r} has dtype {text.dtype}: it must be a floating-point type")
    return text


# ---- VAE -----------------------------------------------------------------------------------------------------------


def load_vae(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Any:
    """The autoencoder, with the fast path for single frames."""
    vae = source.load(AutoencoderKLQwenImage, "vae", device, dtype)
    use_2d(vae)
    return vae


def decode(vae: Any, rows: Sequence[Tensors], params: ResolvedParams) -> torch.Tensor:
    """Packed normalised latents [1, S, 4 C] each to [B, 1, 3, H, W] in [-1, 1]."""
    patch_px = vae_compression(vae) * PATCH
    grid = (1, params.height // patch_px, params.width // patch_px)
    shape = (1, grid[1] * grid[2], vae.config.z_dim * PATCH * PATCH)
    for row in rows:
        if "latents" not in row or tuple(row["latents"].shape) != shape:
            raise InvalidRequest(f"the VAE needs 'latents' of shape {list(shape)}, not {_shapes(row)}")
        if not row["latents"].is_floating_point():
            raise InvalidRequest(f"the VAE needs floating-point latents, not {row['latents'].dtype}")
    latents = unpack(torch.cat([row["latents"] for row in rows]).to(vae.device), grid).to(vae.dtype)
    mean, scale = _statistics(vae, latents)
    frames: torch.Tensor = vae.decode(latents / scale + mean, return_dict=False)[0]
    return frames.transpose(1, 2)


def encode(vae: Any, pictures: Sequence[Frames], params: ResolvedParams) -> Tensors:
    """Pictures to packed latents (the posterior's mode, normalised)."""
    packed = []
    for picture in pictures:
        pixels = torch.from_numpy(picture[:1].copy()).to(vae.device).permute(3, 0, 1, 2)[None]
        latents = vae.encode((pixels.to(torch.float32) / 127.5 - 1).to(vae.dtype)).latent_dist.mode()
        mean, scale = _statistics(vae, latents)
        packed.append(pack(((latents - mean) * scale)[:, :, 0]))
    return {"image_latents": torch.cat(packed, dim=1)}


def latent_geometry(vae: Any) -> tuple[int, int, int]:
    """Channels, spatial and temporal compression."""
    return vae.config.z_dim, vae_compression(vae), 2 ** sum(vae.config.temperal_downsample)


def vae_compression(vae: Any) -> int:
    """Pixels for one latent along a side."""
    return int(2 ** len(vae.config.temperal_downsample))


def _statistics(vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
    scale = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents.device, latents.dtype)
    return mean, scale


def _shapes(row: Tensors) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in row.items()) or "nothing"


FAMILY = Family(
    name="qwen_image",
    text=TEXT,
    dit=DitPart(
        load=load_dit,
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
    ),
    vae=VaePart(load=load_vae, decode=decode, encode=encode, latent_geometry=latent_geometry),
    variants=VARIANTS,
    presets=PRESETS,
    tiny=tiny,
)
