"""Last stage of training the video model: the transformer, by flow matching on latents, with a text encoder that reads.

Called by demo.clips.train. The forward passes here compute what the stock ones do (a test compares them), written so
that the loss compiles and the text costs little: prompts are padded with zeros to 512 tokens and Wan's transformer has
no mask, so all zeros have the same key and value. One of them, its logit raised by the logarithm of their number,
stands for all.

Shapes: B rows, S = 9 x 8 x 8 patches, T text tokens, H heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from demo.clips.components import FLOW_SHIFT
from demo.stage import Stage

PADDED_TOKENS = 512
"""The length that the family pads every prompt to."""
UNCONDITIONAL_SHARE = 0.1
HIGH_NOISE_SHARE = 0.15
"""Share of samples drawn from the noisiest tenth, where background and path are decided."""

Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class LatentClips:
    """Normalised latents (N, 16, 9, 16, 16), tokens (N, captions, T) and lengths (N, captions), on the device.

    `weights` (N, S) is how much each patch counts, 1 on average. `empty_tokens` (E, T) and `empty_lengths` (E,) are
    the prompts that stand for no prompt. T is above every length.
    """

    latents: torch.Tensor
    weights: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor
    empty_tokens: torch.Tensor
    empty_lengths: torch.Tensor


def modules_of(text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel) -> nn.ModuleDict:
    """What a stage trains here: the transformer.

    The text encoder stays as it is. It can read by now, and the first steps, whose gradients hardly depend on the text,
    would undo that: after 160 of them one told 65 % of the shapes instead of all.
    """
    return nn.ModuleDict({"text_encoder": text_encoder.requires_grad_(False), "transformer": transformer})


def encode_text(text_encoder: UMT5EncoderModel, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Last hidden states (B, T, width), zeros after each prompt."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    real = positions < lengths[:, None]
    hidden = text_encoder.encoder.embed_tokens(ids)
    for block in text_encoder.encoder.block:
        attention, feed_forward = block.layer
        inner = attention.SelfAttention
        normed = attention.layer_norm(hidden)
        query, key, value = (
            layer(normed).unflatten(-1, (inner.n_heads, -1)).transpose(1, 2) for layer in (inner.q, inner.k, inner.v)
        )
        bias = inner.compute_bias(ids.shape[1], ids.shape[1], device=ids.device)
        mask = bias.masked_fill(~real[:, None, None, :], -1e9).to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
        hidden = hidden + inner.o(mixed.transpose(1, 2).flatten(2))
        hidden = feed_forward(hidden)
    encoded: torch.Tensor = text_encoder.encoder.final_layer_norm(hidden)
    return encoded * real[..., None]


def padding_bias(lengths: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """What is added to the logits of T text tokens, so that they act like 512: (B, 1, 1, T), T above every length."""
    positions = torch.arange(num_tokens, device=lengths.device)
    padding = torch.log((PADDED_TOKENS - lengths).float())[:, None]
    bias = torch.where(positions < lengths[:, None], 0.0, torch.where(positions == lengths[:, None], padding, -1e9))
    return bias[:, None, None, :]


def predict(
    transformer: WanTransformer3DModel,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    text: torch.Tensor,
    bias: torch.Tensor,
    rotary: Rotary,
) -> torch.Tensor:
    """The velocity in patches (B, S, 64) for latents (B, 16, 9, 16, 16) at timesteps (B,), 0 to 1000."""
    hidden = transformer.patch_embedding(latents).flatten(2).transpose(1, 2)
    temb, modulation, text, _ = transformer.condition_embedder(timestep, text)
    modulation = modulation.unflatten(1, (6, -1))
    for block in transformer.blocks:
        hidden = _block(block, hidden, text, modulation, bias, rotary)
    shift, scale = (transformer.scale_shift_table + temb[:, None]).chunk(2, dim=1)
    velocity: torch.Tensor = transformer.proj_out(transformer.norm_out(hidden.float()) * (1 + scale) + shift)
    return velocity


def _block(
    block: Any, hidden: torch.Tensor, text: torch.Tensor, modulation: torch.Tensor, bias: torch.Tensor, rotary: Rotary
) -> torch.Tensor:
    table = (block.scale_shift_table + modulation.float()).chunk(6, dim=1)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table
    normed = block.norm1(hidden.float()) * (1 + scale) + shift
    hidden = hidden + _attend(block.attn1, normed, normed, rotary=rotary) * gate
    hidden = hidden + _attend(block.attn2, block.norm2(hidden.float()), text, bias=bias)
    normed = block.norm3(hidden.float()) * (1 + ffn_scale) + ffn_shift
    out: torch.Tensor = hidden + block.ffn(normed) * ffn_gate
    return out


def _attend(
    attn: Any, x: torch.Tensor, source: torch.Tensor, rotary: Rotary | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    value = attn.to_v(source)
    query, key, value = (
        part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for part in (attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(source)), value)
    )
    if rotary is not None:
        query, key = _rotate(query, rotary), _rotate(key, rotary)
    mask = None if bias is None else bias.to(value.dtype)
    mixed = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value, attn_mask=mask)
    out: torch.Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
    return out


def _rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turns pairs of channels; shapes: x (B, H, S, D), factors (S, D/2)."""
    cos, sin = rotary
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(-2)


def rotary_factors(transformer: WanTransformer3DModel, latents: torch.Tensor) -> Rotary:
    """Cosines and sines (S, D/2) of the stock embedding."""
    cos, sin = transformer.rope(latents[:1])
    return cos[0, :, 0, 0::2].float().contiguous(), sin[0, :, 0, 1::2].float().contiguous()


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, F, H, W) -> (B, F H/2 W/2, 4 C), in the order of the transformer's prediction."""
    patches = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
    rows: torch.Tensor = patches.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)
    return rows


def flow_loss(
    modules: nn.ModuleDict,
    clean: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    sigma: torch.Tensor,
    rotary: Rotary,
) -> torch.Tensor:
    """Squared error of the velocity, weighted by patch, one number per sample (B,)."""
    clean = clean.float()
    noise = torch.randn_like(clean)
    noisy = torch.lerp(clean, noise, sigma[:, None, None, None, None])
    text = encode_text(modules["text_encoder"], ids, lengths)
    bias = padding_bias(lengths, ids.shape[1])
    velocity = predict(modules["transformer"], noisy, 1000.0 * sigma, text, bias, rotary)
    return (((velocity.float() - patchify(noise - clean)) ** 2).mean(2) * weights).mean(1)


def sample_sigmas(batch_size: int, device: torch.device) -> torch.Tensor:
    """Stratified noise levels in (0, 1), spread like the scheduler's with more near 1."""
    u = (torch.arange(batch_size, device=device) + torch.rand(batch_size, device=device)) / batch_size
    u = u[torch.randperm(batch_size, device=device)]
    scheduled = FLOW_SHIFT * u / (1.0 + (FLOW_SHIFT - 1.0) * u)
    high = torch.rand(batch_size, device=device) < HIGH_NOISE_SHARE
    return torch.where(high, 0.9 + 0.1 * u, scheduled)


def train(stage: Stage, data: LatentClips, *, batch_size: int, run_s: float, compiled: bool) -> None:
    """Trains until the stage has had its planned seconds or this run `run_s`."""
    device = data.latents.device
    transformer: Any = stage.modules["transformer"]
    rotary = rotary_factors(transformer, data.latents)
    loss_of = torch.compile(flow_loss) if compiled else flow_loss
    first_step = stage.step + 1
    running = torch.zeros((), device=device)
    stage.begin(run_s)
    while stage.goes_on:
        latents, weights, ids, lengths = _sample_batch(data, batch_size)
        sigma = sample_sigmas(batch_size, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(stage.modules, latents, weights, ids, lengths, sigma, rotary).mean()
        loss.backward()
        stage.update()
        running = running.lerp(loss.detach(), max(0.01, 1.0 / (stage.step - first_step + 1)))
        if stage.step % 10 == 0 or device.type == "cpu":
            shown = float(running)  # Waits for the device, so the clock below tells the truth.
            stage.count_time()
            if stage.ranks.rank == 0 and (stage.step % 250 == 0 or stage.step <= 10):
                rate = stage.learning_rate()
                print(f"denoiser step {stage.step} {stage.seconds:.0f} s loss {shown:.4f} lr {rate:.1e}", flush=True)
            if not shown < 100.0:
                raise FloatingPointError(f"the denoiser diverged at step {stage.step}")


def _sample_batch(data: LatentClips, batch_size: int) -> tuple[torch.Tensor, ...]:
    """Random latents, their weights and a caption of each, a tenth without a prompt."""
    device = data.latents.device
    rows = torch.randint(len(data.latents), (batch_size,), device=device)
    which = torch.randint(data.tokens.shape[1], (batch_size,), device=device)
    empty = torch.randint(len(data.empty_tokens), (batch_size,), device=device)
    dropped = torch.rand(batch_size, device=device) < UNCONDITIONAL_SHARE
    tokens = torch.where(dropped[:, None], data.empty_tokens[empty], data.tokens[rows, which])
    lengths = torch.where(dropped, data.empty_lengths[empty], data.lengths[rows, which])
    return data.latents[rows], data.weights[rows].float(), tokens.long(), lengths.long()
