"""First stage of training the video model: the causal autoencoder, on painted clips.

Called by demo.clips.train. The stock class passes a clip through chunk by chunk with a cache of frames. Here the whole
clip goes through at once (a test compares the two), and each 3-D convolution runs as a 2-D one over frames that are
stacked in its channels: with few channels that is faster, and the whole loss compiles into one graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, WanResample
from torch import nn

from demo.clips.batches import MovingBatch, paint
from demo.clips.scenes import NUM_FRAMES, SIDE_PX
from demo.ranks import ALONE, Ranks
from demo.stage import Stage

MAX_LATENT_NOISE = 0.1
"""The decoder meets latents with up to this share of noise, so that it forgives small errors of the denoiser."""

OVERLOOKED = 0.03
"""Directions of the latents below this share of the mean power stay small: the decoder meets as much noise in each."""


def _stacked_forward(conv: WanCausalConv3d, x: torch.Tensor) -> torch.Tensor:
    """Shapes: (N, C, F, H, W) in, (N, C', F', H', W') out."""
    depth, (step, *stride) = conv.kernel_size[0], conv.stride
    pad_w, _, pad_h, _, before, _ = conv._padding
    x = F.pad(x, (0, 0, 0, 0, before, 0))
    num_out = (x.shape[2] - depth) // step + 1
    shifted = [x[:, :, k : k + (num_out - 1) * step + 1 : step] for k in range(depth)]
    stacked = torch.cat(shifted, dim=1).transpose(1, 2).flatten(0, 1)
    weight = conv.weight.transpose(1, 2).flatten(1, 2)
    out = F.conv2d(stacked, weight, conv.bias, tuple(stride), (pad_h, pad_w))
    clips: torch.Tensor = out.unflatten(0, (-1, num_out)).transpose(1, 2)
    return clips


def _whole_clip_resample(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    """What the cached one does over all chunks: the first frame stands alone, time is scaled for those after it."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        first, later = x[:, :, :1], layer.time_conv(x[:, :, 1:])
        pairs = later.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat([first, pairs], dim=2)
    frames = x.shape[2]
    x = layer.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)
    if layer.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


@contextmanager
def whole_clips(vae: AutoencoderKLWan) -> Iterator[None]:
    """Within, encoder and decoder of `vae` take whole clips without a cache."""
    forwards = {WanCausalConv3d: _stacked_forward, WanResample: _whole_clip_resample}
    changed = [module for module in vae.modules() if type(module) in forwards]
    for module in changed:
        module.forward = MethodType(forwards[type(module)], module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Mean and log variance: (N, 3, 1 + 4 k, H, W) -> (N, 32, 1 + k, H/8, W/8). Within `whole_clips`."""
    moments: torch.Tensor = vae.quant_conv(vae.encoder(clips))
    return moments


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Clips, not clipped: (N, 16, 1 + k, H/8, W/8) -> (N, 3, 1 + 4 k, H, W). Within `whole_clips`."""
    clips: torch.Tensor = vae.decoder(vae.post_quant_conv(latents))
    return clips


def reconstruction_loss(
    vae: AutoencoderKLWan, scenes: MovingBatch, tracks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted L1 + MSE + gradient L1 + a little KL; also the plain mean squared error, for the log."""
    clips, weight = paint(scenes, tracks)
    weight = weight / weight.mean()
    mean, log_variance = encode(vae, clips).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30.0, 20.0)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1.0 - log_variance).mean()
    spread = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
    level = MAX_LATENT_NOISE * torch.rand(mean.shape[0], 1, 1, 1, 1, device=mean.device)
    noise = (0.5 * log_variance).exp() * torch.randn_like(mean) + level * spread * torch.randn_like(mean)
    error = decode(vae, mean + noise).float() - clips
    down, across = error.diff(dim=3), error.diff(dim=4)
    edges = (down.abs() * weight[:, :, :, 1:]).mean() + (across.abs() * weight[..., 1:]).mean()
    squared = error**2
    loss = (error.abs() * weight).mean() + (squared * weight).mean() + 0.3 * edges + 1e-4 * kl
    return loss, squared.mean().detach()


def train(
    stage: Stage, vae: AutoencoderKLWan, scenes: MovingBatch, *, batch_size: int, run_s: float, compiled: bool
) -> None:
    """Trains until the stage has had its planned seconds or this run `run_s`."""
    device = scenes.x.device
    loss_of: Callable[..., tuple[torch.Tensor, torch.Tensor]] = reconstruction_loss
    if compiled:
        loss_of = torch.compile(reconstruction_loss)
    with whole_clips(vae):
        stage.begin(run_s)
        while stage.goes_on:
            chosen = scenes[torch.randint(len(scenes), (batch_size,), device=device)]
            # Whole clips: one trained on 17 frames carried colours on from the first frame, and lost them after 19.
            tracks = chosen.tracks()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, squared = loss_of(vae, chosen, tracks)
            loss.backward()
            stage.update()
            if stage.step % 10 == 0 or device.type == "cpu":
                error = float(squared)  # Waits for the device, so the clock below tells the truth.
                stage.count_time()
                if stage.ranks.rank == 0 and (stage.step % 100 == 0 or stage.step <= 10):
                    psnr = 10.0 * torch.log10(torch.tensor(4.0 / error)).item()
                    print(
                        f"autoencoder step {stage.step} {stage.seconds:.0f} s loss {loss.item():.4f} psnr {psnr:.1f}",
                        flush=True,
                    )
                if not error < 10.0:
                    raise FloatingPointError(f"the autoencoder diverged at step {stage.step}")


@torch.no_grad()
def even_out(vae: AutoencoderKLWan, scenes: MovingBatch, *, batch_size: int, ranks: Ranks = ALONE) -> None:
    """Gives the latents' directions about the same power; clips are coded as before.

    Flat colours make up most of a clip's latents, along two or three directions; outlines lie in what is left, where
    noise hides them first and the denoiser's loss hardly sees them. The encoder's last layer turns the latents and the
    decoder's first one turns them back. The turn is symmetric: unlike one to principal axes, which come in any sign, it
    is the same to rounding when a run that goes on computes it again.
    """
    parts = [scenes[slice(at, at + batch_size)] for at in range(0, min(len(scenes), 8 * batch_size), batch_size)]
    with whole_clips(vae), torch.autocast(scenes.x.device.type, torch.bfloat16, enabled=scenes.x.is_cuda):
        coded = [encode(vae, paint(part, part.tracks())[0]).transpose(0, 1).flatten(1).double() for part in parts]
    means, log_variances = torch.cat(coded, dim=1).chunk(2)
    moments = [means.mean(1), means @ means.T / means.shape[1], log_variances.exp().mean(1)]
    ranks.average(moments)
    mean, second, variance = moments
    power, axes = torch.linalg.eigh(second - mean.outer(mean))
    turn = axes @ torch.diag((power + OVERLOOKED * power.mean()).rsqrt()) @ axes.T
    _turn_latents(vae, turn, mean, turn**2 @ variance)


def _turn_latents(vae: AutoencoderKLWan, turn: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Latents z become turn (z - mean), of the given variances (16,)."""
    quant, post, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    quant.weight[:channels] = (turn @ quant.weight[:channels].double().flatten(1)).view_as(quant.weight[:channels])
    quant.bias[:channels] = turn @ (quant.bias[:channels].double() - mean)
    nn.init.zeros_(quant.weight[channels:])
    quant.bias[channels:] = variance.log()
    weight = post.weight.double().flatten(1)
    post.weight.copy_((weight @ torch.linalg.inv(turn)).view_as(post.weight))
    post.bias += weight @ mean


@torch.no_grad()
def encode_all(
    vae: AutoencoderKLWan, scenes: MovingBatch, *, batch_size: int, compiled: bool, ranks: Ranks = ALONE
) -> dict[str, torch.Tensor]:
    """Latents of this rank's scenes, normalised and in bf16 on the device, and the weights of their patches in fp16.

    Shapes: `latents` (N, 16, 9, 16, 16); `mean` and standard deviation `std` of each channel over the scenes of all
    ranks, (16,) each; `weights` (N, 576), 1 on average for each scene.
    """

    def encoded(batch: MovingBatch, tracks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clips, weight = paint(batch, tracks)
        return encode(vae, clips).chunk(2, dim=1)[0].float(), patch_weights(weight)

    device, channels, side = scenes.x.device, vae.config.z_dim, SIDE_PX // 8
    run = torch.compile(encoded) if compiled else encoded
    frames = (NUM_FRAMES - 1) // 4 + 1
    latents = torch.empty(len(scenes), channels, frames, side, side, dtype=torch.bfloat16, device=device)
    weights = torch.empty(len(scenes), frames * (side // 2) ** 2, dtype=torch.float16, device=device)
    with whole_clips(vae), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for start in range(0, len(scenes), batch_size):
            # Always a full batch, so that nothing compiles twice: the last one overlaps the one before.
            rows = slice(max(0, min(start, len(scenes) - batch_size)), start + batch_size)
            means, weights[rows] = run(scenes[rows], scenes[rows].tracks())
            latents[rows] = means.to(torch.bfloat16)
    mean, std = _normalise(latents, batch_size, ranks)
    return {"latents": latents, "mean": mean, "std": std, "weights": weights}


def _normalise(latents: torch.Tensor, batch_size: int, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """In place; returns mean and standard deviation of each channel over the latents of all ranks."""
    axes = (0, 2, 3, 4)
    sums = torch.zeros(2, latents.shape[1], dtype=torch.float64, device=latents.device)
    for part in latents.split(batch_size):
        sums += torch.stack([part.double().sum(axes), part.double().square().sum(axes)])
    moments = sums / (latents.numel() / latents.shape[1])
    ranks.average([moments])
    mean, std = moments[0].float(), (moments[1] - moments[0] ** 2).sqrt().float()
    for part in latents.split(batch_size):
        part.copy_((part.float() - mean[:, None, None, None]) / std[:, None, None, None])
    return mean, std


def patch_weights(weight: torch.Tensor) -> torch.Tensor:
    """Weights of pixels (N, 1, 33, 128, 128) for the patches of 2x2 latents: (N, 576) in fp16, 1 on average."""
    first, later = weight[:, :, :1], weight[:, :, 1:]
    pooled = torch.cat([F.avg_pool3d(first, (1, 16, 16)), F.avg_pool3d(later, (4, 16, 16))], dim=2).flatten(1)
    return (pooled / pooled.mean(1, keepdim=True)).half()
