"""Wan's transformer cut in three: embed, blocks, head. One after the other they are the library's forward.

Shapes: B rows, C channels, S = F (H/2) (W/2) tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformerBlock
from torch import nn

from services.families.wan.attention import CROSS, SELF
from services.family import Block, ModelPlan, SequenceRegion, Tokens

HIDDEN = ("hidden",)

# Query and key norms run over all heads at once. "temb" is the signal of published step caches.
PLAN = ModelPlan(
    block_classes=(WanTransformerBlock, WanVACETransformerBlock),
    column=("*blocks.*.attn[12].to_[qkv]", "*blocks.*.attn2.add_[kv]_proj", "*blocks.*.ffn.net.0.proj"),
    row=("*blocks.*.attn[12].to_out.0", "*blocks.*.ffn.net.2"),
    gathered=("condition_embedder.*", "proj_out"),
    norms_across_heads=("*blocks.*.attn[12].norm_[qk]", "*blocks.*.attn2.norm_added_k"),
    attention=(SELF, CROSS),
    spread=(SELF,),
    sequence=(
        Tokens("hidden"),
        Tokens("control"),
        Tokens("start"),
        Tokens("rotary"),
        Tokens("temb", ndim=3),
        Tokens("modulation", ndim=4),
    ),
    region=SequenceRegion(
        fields=(Tokens("hidden"), Tokens("control"), Tokens("start"), Tokens("modulation", ndim=4)),
        gathers={"*blocks.*.attn[12]": {"hidden_states": HIDDEN}, "*blocks.*.ffn": {"hidden_states": HIDDEN}},
        scatters={"*blocks.*.attn[12].to_out.0": HIDDEN, "*blocks.*.ffn.net.2": HIDDEN},
    ),
    flow=("hidden", "control"),
    fills_text=False,
    high_precision=("*patch_embedding", "condition_embedder", "norm_out", "proj_out"),
    cache_signal="temb",
)


@dataclass(slots=True)
class Batch:
    """Rows of one forward.

    Attributes:
        latents: [B, C, F, H, W], where a model wants it with channels that say what is given of the clip.
        timestep: [B] or, one a token, [B, S].
        text: [B, 512, D].
        pictures: embeddings of input pictures [B, T, D], for models with an image encoder.
        control: for VACE, what steers the clip [B, C', F, H, W].
    """

    latents: torch.Tensor
    timestep: torch.Tensor
    text: torch.Tensor
    pictures: torch.Tensor | None = None
    control: torch.Tensor | None = None


@dataclass(slots=True)
class WanStreams:
    """What the blocks pass on.

    `text` has the tokens of input pictures before it. `temb` is [B, D] and `modulation` [B, 6, D], or [B, S, D] and
    [B, S, 6, D]; `grid` counts patches (F, H, W). For VACE, `control` is the second stream [B, S, D] that its own
    blocks change, and `start` is `hidden` as it entered the first block.
    """

    hidden: torch.Tensor
    text: torch.Tensor
    temb: torch.Tensor
    modulation: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    grid: tuple[int, int, int]
    control: torch.Tensor | None = None
    start: torch.Tensor | None = None


def embed(module: nn.Module, batch: Batch) -> WanStreams:
    """As WanTransformer3DModel.forward up to its blocks."""
    model: Any = module
    hidden = model.patch_embedding(batch.latents)
    _, _, frames, rows, columns = hidden.shape
    tokens = batch.timestep.shape[1] if batch.timestep.ndim == 2 else None
    pictures = batch.pictures
    if pictures is not None and model.config.pos_embed_seq_len:
        # The library puts the first and the last picture of a clip side by side here.
        pictures = pictures.unflatten(1, (2, -1)).flatten(0, 1)
    temb, modulation, text, pictures = model.condition_embedder(
        batch.timestep.flatten(), batch.text, pictures, timestep_seq_len=tokens
    )
    hidden = _tokens(hidden)
    return WanStreams(
        hidden=hidden,
        text=text if pictures is None else torch.cat([pictures, text], dim=1),
        temb=temb,
        modulation=modulation.unflatten(-1, (6, -1)),
        rotary=model.rope(batch.latents),
        grid=(frames, rows, columns),
        control=None if batch.control is None else _tokens(model.vace_patch_embedding(batch.control)),
        start=None if batch.control is None else hidden,
    )


def _tokens(patches: torch.Tensor) -> torch.Tensor:
    return patches.flatten(2).transpose(1, 2).contiguous()


def blocks(module: nn.Module) -> Sequence[Block]:
    """The transformer's own blocks; those of VACE stand behind the blocks whose result they add to."""
    model: Any = module
    control = dict(zip(model.config.get("vace_layers", ()), enumerate(getattr(model, "vace_blocks", ())), strict=True))
    entries: list[Block] = []
    for index, block in enumerate(model.blocks):
        entries.append(_block(f"blocks.{index}", block))
        if index in control:
            entries.append(_control_block(f"vace_blocks.{control[index][0]}", control[index][1]))
    return entries


def _block(name: str, block: Any) -> Block:
    def run(streams: WanStreams) -> WanStreams:
        # `forward`, not `__call__`: a feature may have rebound it, and nothing here hangs on hooks.
        hidden = block.forward(streams.hidden, streams.text, streams.modulation, streams.rotary)
        return replace(streams, hidden=hidden)

    return Block(name, block, run)


def _control_block(name: str, block: Any) -> Block:
    def run(streams: WanStreams) -> WanStreams:
        # The library runs all of these first. They depend on each other and on `start` only, so here each runs where
        # its hint is wanted, and no hint has to be kept.
        hint, control = block.forward(streams.start, streams.text, streams.control, streams.modulation, streams.rotary)
        return replace(streams, hidden=streams.hidden + hint, control=control)

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
