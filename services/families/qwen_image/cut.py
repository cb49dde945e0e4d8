"""Qwen-Image's transformer cut in three: embed, blocks, head. One after the other they are the library's forward.

Shapes: B rows, S image tokens, T text tokens, C latent channels, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import nn

from services.families.qwen_image.attention import JOINT, rotary_factors
from services.family import Block, ModelPlan, SequenceRegion, Tokens

Grid = tuple[int, int, int]  # frames, rows, columns of patches


HIDDEN, TEXT = ("hidden",), ("text",)

# Joint attention that passes filling over: prompts of any length share a batch.
PLAN = ModelPlan(
    block_classes=(QwenImageTransformerBlock,),
    column=("*.attn.to_q", "*.attn.to_k", "*.attn.to_v", "*.attn.add_[qkv]_proj", "*.net.0.proj"),
    row=("*.attn.to_out.0", "*.attn.to_add_out", "*.net.2"),
    gathered=("*_mod.1", "img_in", "txt_in", "time_text_embed.*", "norm_out.linear", "proj_out"),
    attention=(JOINT,),
    spread=(JOINT,),
    sequence=(Tokens("hidden"), Tokens("text"), Tokens("rotary"), Tokens("still")),
    region=SequenceRegion(
        fields=(Tokens("hidden"), Tokens("text"), Tokens("still")),
        gathers={
            "*.attn": {"hidden_states": HIDDEN, "encoder_hidden_states": TEXT},
            "*.img_mlp": {"hidden_states": HIDDEN},
            "*.txt_mlp": {"hidden_states": TEXT},
        },
        scatters={
            "*.attn.to_out.0": HIDDEN,
            "*.attn.to_add_out": TEXT,
            "*.img_mlp.net.2": HIDDEN,
            "*.txt_mlp.net.2": TEXT,
        },
    ),
    joint=("text", "hidden"),
    flow=("hidden", "text"),
    fills_text=True,
    high_precision=("time_text_embed", "norm_out", "proj_out"),
    cache_signal="modulated",
)


@dataclass(slots=True)
class Batch:
    """Rows of one forward.

    Attributes:
        latents: [B, S, 4 C], the own tokens of what is made first, then those of input pictures.
        filling: [B] zeros in front of each row's text, on the CPU; None where all texts have one length.
        grids: of the picture, or of the whole and its layers, then of input pictures.
        num_image_tokens: the picture's own.
    """

    latents: torch.Tensor
    timestep: torch.Tensor
    text: torch.Tensor
    filling: torch.Tensor | None
    grids: tuple[Grid, ...]
    num_image_tokens: int


@dataclass(slots=True)
class QwenStreams:
    """What the blocks pass on.

    Attributes:
        hidden: image tokens [B, S, D].
        text: [B, T, D].
        filling: as in `Batch`: text comes first in joint attention.
        temb: [B, D]; where input pictures stand at timestep 0, [2 B, D]: those of the rows, then those of timestep 0.
        rotary: factors [1, S, D / 2, 2] of the image and [1 or B, T, D / 2, 2] of the text.
        still: [B, S], 1 for the tokens that stand at timestep 0; None in models that have none.
    """

    hidden: torch.Tensor
    text: torch.Tensor
    filling: torch.Tensor | None
    temb: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    num_image_tokens: int
    still: torch.Tensor | None = None


def embed(module: nn.Module, batch: Batch) -> QwenStreams:
    """As QwenImageTransformer2DModel.forward up to its blocks."""
    model: Any = module
    hidden = model.img_in(batch.latents)
    timestep = batch.timestep.to(hidden.dtype)
    text = model.txt_in(model.txt_norm(batch.text))
    still = None
    if model.config.zero_cond_t:
        timestep = torch.cat([timestep, timestep * 0])
        still = torch.zeros(hidden.shape[:2], dtype=torch.int, device=hidden.device)
        still[:, batch.num_image_tokens :] = 1
    # Of latents that are no plain RGB picture.
    kind = timestep.new_zeros(len(timestep), dtype=torch.long) if model.config.use_additional_t_cond else None
    image, words = model.pos_embed([list(batch.grids)], max_txt_seq_len=text.shape[1], device=hidden.device)
    return QwenStreams(
        hidden=hidden,
        text=text,
        filling=batch.filling,
        temb=model.time_text_embed(timestep, hidden, kind),
        rotary=(rotary_factors(image), _behind_filling(rotary_factors(words), batch.filling)),
        num_image_tokens=batch.num_image_tokens,
        still=still,
    )


def _behind_filling(words: torch.Tensor, filling: torch.Tensor | None) -> torch.Tensor:
    """Factors [1, T, ...] of positions 0, 1, ... for texts that begin behind filling: [B, T, ...]."""
    if filling is None:
        return words
    places = (torch.arange(words.shape[1], device=filling.device) - filling[:, None]).clamp(min=0)
    return words[0, places.to(words.device)]


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
            encoder_hidden_states_mask=streams.filling,
            temb=streams.temb,
            image_rotary_emb=streams.rotary,
            modulate_index=streams.still,
        )
        return replace(streams, hidden=hidden, text=text)

    return Block(name, block, run)


def head(module: nn.Module, streams: QwenStreams) -> torch.Tensor:
    """Velocity [B, S, 4 C] of the picture's own tokens."""
    model: Any = module
    temb = streams.temb[: len(streams.hidden)]
    prediction: torch.Tensor = model.proj_out(model.norm_out(streams.hidden, temb))
    return prediction[:, : streams.num_image_tokens]
