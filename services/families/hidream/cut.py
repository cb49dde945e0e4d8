"""HiDream's transformer cut in three: embed, blocks, head. One after the other they are the library's forward.

Blocks of the first part keep image and text as two streams, those of the second part attend over one sequence. Each
block also sees the hidden states of a Llama layer of its own, and what it makes of them is dropped. Image and text
stay apart between blocks here, so that the streams are alike everywhere: a rank may start at any block.
Shapes: B rows, S image tokens, T text tokens, C latent channels, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_hidream_image import (
    HiDreamImageSingleTransformerBlock,
    HiDreamImageTransformerBlock,
)
from torch import nn

from services.families.hidream.attention import JOINT, rotary_factors
from services.families.hidream.conditions import llama_layers
from services.family import Block, ModelPlan, SequenceRegion, Tokens

Rotary = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

HIDDEN, TEXTS, ALL = ("hidden",), ("text", "llama"), ("hidden", "text", "llama")
DOUBLE, SINGLE = "double_stream_blocks.*", "single_stream_blocks.*"

# Query and key norms run over all heads at once. There is no text mask: all prompts have one length.
PLAN = ModelPlan(
    block_classes=(HiDreamImageTransformerBlock, HiDreamImageSingleTransformerBlock),
    column=("*.attn1.to_[qkv]", "*.attn1.to_[qkv]_t", "*.w1", "*.w3"),
    row=("*.attn1.to_out", "*.attn1.to_out_t", "*.ff_t.w2"),
    partial=("*.ff_i.experts.*.w2", "*.ff_i.shared_experts.w2"),
    summed=("*.ff_i.total",),
    gathered=(
        "*.adaLN_modulation.1",
        "caption_projection.*.linear",
        "x_embedder.proj",
        "t_embedder.*",
        "p_embedder.*",
        "final_layer.linear",
    ),
    norms_across_heads=("*.attn1.[qk]_rms_norm", "*.attn1.[qk]_rms_norm_t"),
    experts=("*.ff_i.experts",),
    attention=(JOINT,),
    spread=(JOINT,),
    sequence=(Tokens("hidden"), Tokens("text"), Tokens("llama"), Tokens("kept"), Tokens("rotary", dim=0)),
    region=SequenceRegion(
        fields=(Tokens("hidden"), Tokens("text")),
        gathers={
            f"{DOUBLE}.attn1": {"norm_hidden_states": HIDDEN, "norm_encoder_hidden_states": TEXTS},
            f"{DOUBLE}.ff_i": {"hidden": HIDDEN},
            f"{DOUBLE}.ff_t": {"x": TEXTS},
            f"{SINGLE}.attn1": {"norm_hidden_states": ALL},
            f"{SINGLE}.ff_i": {"hidden": ALL},
        },
        scatters={
            f"{DOUBLE}.attn1.to_out": HIDDEN,
            f"{DOUBLE}.attn1.to_out_t": TEXTS,
            f"{DOUBLE}.ff_i.total": HIDDEN,
            f"{DOUBLE}.ff_t.w2": TEXTS,
            f"{SINGLE}.attn1.to_out": ALL,
            f"{SINGLE}.ff_i.total": ALL,
        },
        pieces=("own_llama",),
    ),
    joint=("hidden", "text", "llama"),
    flow=("hidden", "text"),
    high_precision=("t_embedder", "p_embedder", "x_embedder", "final_layer"),
    cache_signal="temb",
)


@dataclass(slots=True)
class Batch:
    """Rows of one forward.

    Attributes:
        latents: [B, C, h, w]; timestep: [B], in the scheduler's own dtype.
        t5: [B, 128, width]; pooled: [B, width].
        llama: [B, 128, L, width] of the L layers that blocks see, in ascending order.
    """

    latents: torch.Tensor
    timestep: torch.Tensor
    t5: torch.Tensor
    llama: torch.Tensor
    pooled: torch.Tensor


@dataclass(slots=True)
class HiDreamStreams:
    """What the blocks pass on.

    Attributes:
        hidden: image tokens [B, S, D]; of pictures that are no squares, filled up to the model's longest sequence.
        text: T5's tokens, then those of Llama's last layer [B, 256, D].
        llama: as in `Batch`; each block projects the layer it sees.
        kept: [B, S], 1, and 0 for filling. Always there, so that compiled blocks are the same for all shapes.
        rotary: factors [tokens, D / 2, 2] of hidden, text and llama.
        grid: rows and columns of patches.
    """

    hidden: torch.Tensor
    text: torch.Tensor
    llama: torch.Tensor
    kept: torch.Tensor
    temb: torch.Tensor
    rotary: Rotary
    grid: tuple[int, int]


def embed(module: nn.Module, batch: Batch) -> HiDreamStreams:
    """As HiDreamImageTransformer2DModel.forward up to its blocks."""
    model: Any = module
    patches, kept, grid = _patchify(model, batch.latents)
    last = len(model.config.llama_layers) - 1
    text = torch.cat([model.caption_projection[-1](batch.t5), _llama(model, batch.llama, last)], dim=1)
    return HiDreamStreams(
        hidden=model.x_embedder(patches),
        text=text,
        llama=batch.llama,
        kept=kept,
        temb=model.t_embedder(batch.timestep, batch.latents.dtype) + model.p_embedder(batch.pooled),
        rotary=_rotary(model, grid, (patches.shape[1], text.shape[1], batch.llama.shape[1])),
        grid=grid,
    )


def blocks(module: nn.Module) -> Sequence[Block]:
    """The transformer's own blocks, out of their wrappers."""
    model: Any = module
    double = len(model.double_stream_blocks)
    return [
        _double(model, index, f"double_stream_blocks.{index}.block", wrapper.block)
        for index, wrapper in enumerate(model.double_stream_blocks)
    ] + [
        _single(model, double + index, f"single_stream_blocks.{index}.block", wrapper.block)
        for index, wrapper in enumerate(model.single_stream_blocks)
    ]


def _double(model: Any, index: int, name: str, block: Any) -> Block:
    def run(streams: HiDreamStreams) -> HiDreamStreams:
        # `forward`, not `__call__`: a feature may have rebound it, and nothing here hangs on hooks.
        hidden, text = block.forward(
            hidden_states=streams.hidden,
            hidden_states_masks=streams.kept,
            encoder_hidden_states=torch.cat([streams.text, _own_llama(model, streams, index)], dim=1),
            temb=streams.temb,
            image_rotary_emb=torch.cat(streams.rotary),
        )
        return replace(streams, hidden=hidden, text=text[:, : streams.text.shape[1]])

    return Block(name, block, run)


def _single(model: Any, index: int, name: str, block: Any) -> Block:
    def run(streams: HiDreamStreams) -> HiDreamStreams:
        parts = [streams.hidden, streams.text, _own_llama(model, streams, index)]
        filling = sum(len(factors) for factors in streams.rotary[1:])
        joined = block.forward(
            hidden_states=torch.cat(parts, dim=1),
            hidden_states_masks=F.pad(streams.kept, (0, filling), value=1),
            temb=streams.temb,
            image_rotary_emb=torch.cat(streams.rotary),
        )
        hidden, text, _ = joined.split([part.shape[1] for part in parts], dim=1)
        return replace(streams, hidden=hidden, text=text)

    return Block(name, block, run)


def head(module: nn.Module, streams: HiDreamStreams) -> torch.Tensor:
    """The library's prediction [B, C, h, w]: the velocity with its sign turned."""
    model: Any = module
    rows, columns = streams.grid
    side = model.config.patch_size
    patches = model.final_layer(streams.hidden, streams.temb)[:, : rows * columns]
    # [B, rows, columns, side, side, C]: every patch goes back to its place.
    spread = patches.unflatten(-1, (side, side, -1)).unflatten(1, (rows, columns))
    prediction: torch.Tensor = spread.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return prediction


def _own_llama(model: Any, streams: HiDreamStreams, index: int) -> torch.Tensor:
    """The tokens of `_llama` that this rank's norms run over."""
    own: torch.Tensor = model.own_llama(_llama(model, streams.llama, index))
    return own


def _llama(model: Any, llama: torch.Tensor, index: int) -> torch.Tensor:
    """What block `index` sees of Llama [B, 128, D]."""
    place = llama_layers(model.config).index(model.config.llama_layers[index])
    projected: torch.Tensor = model.caption_projection[index](llama[:, :, place])
    return projected


def _patchify(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Patches [B, S, side side C], which of them are kept, and rows and columns of the picture's own."""
    side = model.config.patch_size
    spread = latents.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    rows, columns = spread.shape[2], spread.shape[4]
    patches = spread.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    filling = 0 if rows == columns else model.max_seq - patches.shape[1]
    kept = F.pad(patches.new_ones(patches.shape[:2]), (0, filling))
    return F.pad(patches, (0, 0, 0, filling)), kept, (rows, columns)


def _rotary(model: Any, grid: tuple[int, int], lengths: tuple[int, int, int]) -> Rotary:
    """Image tokens stand at (0, row, column); filling and text at the origin."""
    rows, columns = grid
    device = model.x_embedder.proj.weight.device
    positions = torch.zeros(sum(lengths), 3, device=device)
    positions[: rows * columns, 1] = torch.arange(rows, device=device).repeat_interleave(columns)
    positions[: rows * columns, 2] = torch.arange(columns, device=device).repeat(rows)
    image, text, llama = rotary_factors(model.pe_embedder(positions[None])).split(lengths)
    return image, text, llama
