"""FLUX's transformer cut in three: embed, blocks, head. One after the other they are the library's forward.

Shapes: B rows, S image tokens, T text tokens, C latent channels, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn

from services.families.flux.attention import JOINT, Rotary
from services.family import RESULT, Block, ModelPlan, SequenceRegion, Tokens

HIDDEN, TEXT, BOTH = ("hidden",), ("text",), ("text", "hidden")

# No text mask: rows share a batch when their texts have one length. The last linear of a block of one stream takes
# attention (one part) and MLP (four parts) side by side.
PLAN = ModelPlan(
    block_classes=(FluxTransformerBlock, FluxSingleTransformerBlock),
    column=("*.attn.to_[qkv]", "*.attn.add_[qkv]_proj", "*.net.0.proj", "*.proj_mlp"),
    row=("*.attn.to_out.0", "*.attn.to_add_out", "*.net.2", "single_transformer_blocks.*.proj_out"),
    gathered=("*.norm*.linear", "norm_out.linear", "x_embedder", "context_embedder", "time_text_embed.*", "proj_out"),
    segments={"single_transformer_blocks.*.proj_out": (1, 4)},
    attention=(JOINT,),
    spread=(JOINT,),
    sequence=(Tokens("hidden"), Tokens("text"), Tokens("rotary", dim=0)),
    region=SequenceRegion(
        fields=(Tokens("hidden"), Tokens("text")),
        gathers={
            "transformer_blocks.*.attn": {"hidden_states": HIDDEN, "encoder_hidden_states": TEXT},
            "transformer_blocks.*.ff": {"hidden_states": HIDDEN},
            "transformer_blocks.*.ff_context": {"hidden_states": TEXT},
            # Attention and MLP take the same tokens: they are gathered once.
            "single_transformer_blocks.*[0-9].norm": {RESULT: BOTH},
        },
        scatters={
            "transformer_blocks.*.attn.to_out.0": HIDDEN,
            "transformer_blocks.*.attn.to_add_out": TEXT,
            "transformer_blocks.*.ff.net.2": HIDDEN,
            "transformer_blocks.*.ff_context.net.2": TEXT,
            "single_transformer_blocks.*.proj_out": BOTH,
        },
    ),
    joint=("text", "hidden"),
    flow=("hidden", "text"),
    fills_text=False,
    high_precision=("time_text_embed", "norm_out", "proj_out"),
    cache_signal="modulated",
)


@dataclass(slots=True)
class Batch:
    """Rows of one forward.

    Attributes:
        latents: [B, S, 4 C].
        timestep: [B], 1 to 0.
        guidance: [B], the scale that a guidance-distilled model is told; None for others.
        text: [B, T, text width].
        pooled: [B, pooled width].
        rotary: the same for all rows.
    """

    latents: torch.Tensor
    timestep: torch.Tensor
    guidance: torch.Tensor | None
    text: torch.Tensor
    pooled: torch.Tensor
    rotary: Rotary


@dataclass(slots=True)
class FluxStreams:
    """What the blocks pass on: image tokens `hidden` [B, S, D] and `text` [B, T, D]; `temb` is [B, D]."""

    hidden: torch.Tensor
    text: torch.Tensor
    temb: torch.Tensor
    rotary: Rotary


def embed(module: nn.Module, batch: Batch) -> FluxStreams:
    """As FluxTransformer2DModel.forward up to its blocks."""
    model: Any = module
    hidden = model.x_embedder(batch.latents)
    told = (batch.timestep,) if batch.guidance is None else (batch.timestep, batch.guidance)
    temb = model.time_text_embed(*(value.to(hidden.dtype) * 1000 for value in told), batch.pooled)
    return FluxStreams(hidden=hidden, text=model.context_embedder(batch.text), temb=temb, rotary=batch.rotary)


def blocks(module: nn.Module) -> Sequence[Block]:
    """The transformer's own blocks: those of two streams, then those of one."""
    model: Any = module
    double = [_block(f"transformer_blocks.{index}", block) for index, block in enumerate(model.transformer_blocks)]
    single = [
        _block(f"single_transformer_blocks.{index}", block, one_stream=True)
        for index, block in enumerate(model.single_transformer_blocks)
    ]
    return [*double, *single]


def _block(name: str, block: Any, one_stream: bool = False) -> Block:
    def run(streams: FluxStreams) -> FluxStreams:
        if one_stream:
            streams = _side_by_side(streams)
        # `forward`, not `__call__`: a feature may have rebound it, and nothing here hangs on hooks.
        text, hidden = block.forward(
            hidden_states=streams.hidden,
            encoder_hidden_states=streams.text,
            temb=streams.temb,
            image_rotary_emb=streams.rotary,
        )
        return replace(streams, hidden=hidden, text=text)

    return Block(name, block, run)


def _side_by_side(streams: FluxStreams) -> FluxStreams:
    """Text and image as slices of one tensor, as a block of one stream leaves them.

    Compiled code is made for its inputs' strides: tensors of their own, from blocks of two streams, from another rank
    or out of a cache, would take a graph more.
    """
    text, hidden = streams.text, streams.hidden
    row = (text.shape[1] + hidden.shape[1]) * hidden.shape[2]
    if text.stride(0) == hidden.stride(0) == row:
        return streams
    joined = torch.cat((text, hidden), dim=1)
    return replace(streams, text=joined[:, : text.shape[1]], hidden=joined[:, text.shape[1] :])


def head(module: nn.Module, streams: FluxStreams) -> torch.Tensor:
    """Velocity [B, S, 4 C]."""
    model: Any = module
    prediction: torch.Tensor = model.proj_out(model.norm_out(streams.hidden, streams.temb))
    return prediction
