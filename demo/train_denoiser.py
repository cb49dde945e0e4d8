"""Second stage of training: text encoder and transformer together, by flow matching on latents.

Called by demo.train. The forward passes here compute what the stock ones do (a test compares them), written so
that the whole loss compiles into one graph: rotary factors are real, and the padded text needs no mask in the
causal encoder.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from demo.stage import Stage

GRID = 16
"""Patches of 2x2 latents along each side of a 256 px picture."""
UNCONDITIONAL_SHARE = 0.1
SCHEDULE_SHIFT = 1.6487
"""exp(0.5): what the scheduler's dynamic shift is at 256x256. Noise levels are trained where they are used."""
HIGH_NOISE_SHARE = 0.15
"""Share of samples drawn from the noisiest tenth, where background and layout are decided."""

Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class LatentSet:
    """Normalised latents (N, 16, 32, 32), tokens (N, captions, 64) and lengths (N, captions), on the device.

    `weights` (N, 256) is how much each patch counts, 1 on average: objects more than the plain background.
    `prefix` (34,) goes before every prompt; `empty_tokens` (E, 64) and `empty_lengths` (E,) are the prompts that
    stand for no prompt.
    """

    latents: torch.Tensor
    weights: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor
    prefix: torch.Tensor
    empty_tokens: torch.Tensor
    empty_lengths: torch.Tensor


class RealRotaryAttention:
    """The joint attention of a block, with rotary factors as pairs of real numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor,
        image_rotary_emb: tuple[Rotary, Rotary],
        **_: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image_rotary, text_rotary = image_rotary_emb

        def heads(x: torch.Tensor) -> torch.Tensor:
            return torch.unflatten(x, -1, (attn.heads, -1))

        x, text = hidden_states, encoder_hidden_states
        query = torch.cat(
            [
                _rotate(attn.norm_added_q(heads(attn.add_q_proj(text))), text_rotary),
                _rotate(attn.norm_q(heads(attn.to_q(x))), image_rotary),
            ],
            dim=1,
        )
        key = torch.cat(
            [
                _rotate(attn.norm_added_k(heads(attn.add_k_proj(text))), text_rotary),
                _rotate(attn.norm_k(heads(attn.to_k(x))), image_rotary),
            ],
            dim=1,
        )
        value = torch.cat([heads(attn.add_v_proj(text)), heads(attn.to_v(x))], dim=1)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2).to(value.dtype),
            key.transpose(1, 2).to(value.dtype),
            value.transpose(1, 2),
            attn_mask=encoder_hidden_states_mask,
        )
        out = out.transpose(1, 2).flatten(2)
        num_text = text.shape[1]
        return attn.to_out[0](out[:, num_text:]), attn.to_add_out(out[:, :num_text])


def _rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turn pairs of channels; shapes: x (B, S, heads, D), factors (S, D/2)."""
    cos, sin = (factor[:, None, :] for factor in rotary)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.flatten(-2)


def rotary_factors(transformer: QwenImageTransformer2DModel, num_text: int) -> tuple[Rotary, Rotary]:
    """Real and imaginary parts of the stock rotary embedding for image and text."""
    device = transformer.img_in.weight.device
    image, text = transformer.pos_embed([[(1, GRID, GRID)]], max_txt_seq_len=num_text, device=device)
    return (image.real.contiguous(), image.imag.contiguous()), (text.real.contiguous(), text.imag.contiguous())


def encode_text(text_encoder: Qwen2_5_VLForConditionalGeneration, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states (B, S, width) of ids padded on the right; the stock output at every real token."""
    model = text_encoder.model.language_model
    hidden = model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
    rotary = model.rotary_emb(hidden, positions)
    for layer in model.layers:
        out = layer(hidden, attention_mask=None, position_ids=None, position_embeddings=rotary, use_cache=False)
        hidden = out[0] if isinstance(out, tuple) else out
    encoded: torch.Tensor = model.norm(hidden)
    return encoded


def predict(
    transformer: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    text: torch.Tensor,
    mask: torch.Tensor,
    rotary: tuple[Rotary, Rotary],
) -> torch.Tensor:
    """The velocity for packed latents (B, 256, 64) at noise levels (B,), under a text mask (B, S) of bools."""
    hidden = transformer.img_in(latents)
    encoded = transformer.txt_in(transformer.txt_norm(text))
    temb = transformer.time_text_embed(sigma, hidden)
    joint = torch.cat([mask, mask.new_ones(mask.shape[0], latents.shape[1])], dim=1)[:, None, None, :]
    for block in transformer.transformer_blocks:
        encoded, hidden = block(hidden, encoded, joint, temb, rotary)
    velocity: torch.Tensor = transformer.proj_out(transformer.norm_out(hidden, temb))
    return velocity


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, 32, 32) -> (B, 256, 64), as the pipeline packs."""
    patches: torch.Tensor = latents.unflatten(3, (GRID, 2)).unflatten(2, (GRID, 2))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def flow_loss(
    modules: nn.ModuleDict,
    latents: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    sigma: torch.Tensor,
    rotary: tuple[Rotary, Rotary],
) -> torch.Tensor:
    """Squared error of the velocity, weighted by patch, one number per sample (B,)."""
    clean = pack(latents).float()
    noise = torch.randn_like(clean)
    noisy = torch.lerp(clean, noise, sigma[:, None, None])
    num_text = rotary[1][0].shape[0]
    text = encode_text(modules["text_encoder"], ids)[:, -num_text:]
    mask = torch.arange(num_text, device=ids.device) < lengths[:, None]
    velocity = predict(modules["transformer"], noisy, sigma, text, mask, rotary)
    return (((velocity.float() - (noise - clean)) ** 2).mean(2) * weights).mean(1)


def sample_sigmas(batch_size: int, device: torch.device) -> torch.Tensor:
    """Stratified noise levels in (0, 1), spread like the sampler's schedule with more near 1."""
    u = (torch.arange(batch_size, device=device) + torch.rand(batch_size, device=device)) / batch_size
    u = u[torch.randperm(batch_size, device=device)]
    scheduled = SCHEDULE_SHIFT * u / (1.0 + (SCHEDULE_SHIFT - 1.0) * u)
    high = torch.rand(batch_size, device=device) < HIGH_NOISE_SHARE
    return torch.where(high, 0.9 + 0.1 * u, scheduled)


def train(stage: Stage, data: LatentSet, *, batch_size: int, run_s: float, compiled: bool) -> None:
    """Train until the stage has had its planned seconds or this run `run_s`."""
    device = data.latents.device
    transformer: Any = stage.modules["transformer"]
    rotary = rotary_factors(transformer, data.tokens.shape[-1])
    stock = [block.attn.processor for block in transformer.transformer_blocks]
    for block in transformer.transformer_blocks:
        block.attn.processor = RealRotaryAttention()
    loss_of = torch.compile(flow_loss) if compiled else flow_loss
    stage.begin(run_s)
    running = torch.zeros((), device=device)
    while stage.goes_on:
        latents, weights, ids, lengths = _sample_batch(data, batch_size)
        sigma = sample_sigmas(batch_size, device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(stage.modules, latents, weights, ids, lengths, sigma, rotary).mean()
        loss.backward()
        stage.update()
        running = running.lerp(loss.detach(), max(0.01, 1.0 / stage.step))
        if stage.step % 25 == 0:
            shown = float(running)  # Waits for the device, so the clock below tells the truth.
            stage.count_time()
            if stage.step % 500 == 0 or stage.step == 25:
                rate = stage.learning_rate()
                print(f"denoiser step {stage.step} {stage.seconds:.0f} s loss {shown:.4f} lr {rate:.1e}", flush=True)
            if not shown < 100.0:
                raise FloatingPointError(f"the denoiser diverged at step {stage.step}")
    stage.count_time()
    for block, processor in zip(transformer.transformer_blocks, stock, strict=True):
        block.attn.processor = processor


def _sample_batch(data: LatentSet, batch_size: int) -> tuple[torch.Tensor, ...]:
    """Random latents, their weights and a caption of each, a tenth without a prompt; ids carry the prefix."""
    device = data.latents.device
    rows = torch.randint(len(data.latents), (batch_size,), device=device)
    which = torch.randint(data.tokens.shape[1], (batch_size,), device=device)
    empty = torch.randint(len(data.empty_tokens), (batch_size,), device=device)
    dropped = torch.rand(batch_size, device=device) < UNCONDITIONAL_SHARE
    tokens = torch.where(dropped[:, None], data.empty_tokens[empty], data.tokens[rows, which])
    lengths = torch.where(dropped, data.empty_lengths[empty], data.lengths[rows, which])
    ids = torch.cat([data.prefix.expand(batch_size, -1), tokens.long()], dim=1)
    return data.latents[rows], data.weights[rows].float(), ids, lengths
