"""First stage of training: the autoencoder, on painted scenes.

Called by demo.train. For a single frame a causal 3-D convolution sees nothing but padding before the frame, so
it equals a 2-D convolution with the last temporal slice of its weight; training runs it that way, several
times faster, and saves the standard weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage, QwenImageCausalConv3d

from demo.batches import SceneBatch, paint
from demo.stage import Stage

MAX_LATENT_NOISE = 0.2
"""The decoder meets latents with up to this share of noise, so that it forgives small errors of the denoiser."""


def _one_frame_forward(conv: QwenImageCausalConv3d, x: torch.Tensor) -> torch.Tensor:
    """Shapes: (N, C, 1, H, W) in and out."""
    _, stride_h, stride_w = conv.stride
    pad_w, _, pad_h, *_ = conv._padding
    return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, (stride_h, stride_w), (pad_h, pad_w))[:, :, None]


@contextmanager
def one_frame(vae: AutoencoderKLQwenImage) -> Iterator[None]:
    """Within, the causal convolutions of `vae` take single frames only and run as 2-D convolutions."""
    convolutions = [m for m in vae.modules() if isinstance(m, QwenImageCausalConv3d)]
    for conv in convolutions:
        conv.forward = MethodType(_one_frame_forward, conv)
    try:
        yield
    finally:
        for conv in convolutions:
            del conv.forward


def encode(vae: AutoencoderKLQwenImage, images: torch.Tensor) -> torch.Tensor:
    """Mean and log variance of single images: (N, 3, H, W) -> (N, 32, H/8, W/8)."""
    moments: torch.Tensor = vae.quant_conv(vae.encoder(images[:, :, None]))
    return moments[:, :, 0]


def decode(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Images, not clipped: (N, 16, H/8, W/8) -> (N, 3, H, W)."""
    image: torch.Tensor = vae.decoder(vae.post_quant_conv(latents[:, :, None]))
    return image[:, :, 0]


def reconstruction_loss(vae: AutoencoderKLQwenImage, scenes: SceneBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted L1 + MSE + gradient L1 + a little KL; also the plain mean squared error, for the log."""
    images, weight = paint(scenes)
    weight = weight / weight.mean()
    mean, log_variance = encode(vae, images).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30.0, 20.0)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1.0 - log_variance).mean()
    spread = mean.detach().std(dim=(0, 2, 3), keepdim=True)
    level = MAX_LATENT_NOISE * torch.rand(mean.shape[0], 1, 1, 1, device=mean.device)
    noise = (0.5 * log_variance).exp() * torch.randn_like(mean) + level * spread * torch.randn_like(mean)
    error = decode(vae, mean + noise).float() - images
    down, across = error.diff(dim=2), error.diff(dim=3)
    edges = (down.abs() * weight[:, :, 1:]).mean() + (across.abs() * weight[:, :, :, 1:]).mean()
    squared = error**2
    loss = (error.abs() * weight).mean() + (squared * weight).mean() + 0.3 * edges + 1e-4 * kl
    return loss, squared.mean().detach()


def train(
    stage: Stage, vae: AutoencoderKLQwenImage, scenes: SceneBatch, *, batch_size: int, run_s: float, compiled: bool
) -> None:
    """Train until the stage has had its planned seconds or this run `run_s`."""
    device = scenes.background.device
    loss_of: Callable[..., tuple[torch.Tensor, torch.Tensor]] = reconstruction_loss
    if compiled:
        loss_of = torch.compile(reconstruction_loss)
    with one_frame(vae):
        stage.begin(run_s)
        while stage.goes_on:
            rows = torch.randint(len(scenes), (batch_size,), device=device)
            with torch.autocast(device.type, torch.bfloat16):
                loss, squared = loss_of(vae, scenes[rows])
            loss.backward()
            stage.update()
            if stage.step % 25 == 0:
                error = float(squared)  # Waits for the device, so the clock below tells the truth.
                stage.count_time()
                if stage.step % 200 == 0 or stage.step == 25:
                    psnr = 10.0 * torch.log10(torch.tensor(4.0 / error)).item()
                    print(
                        f"autoencoder step {stage.step} {stage.seconds:.0f} s loss {float(loss):.4f} psnr {psnr:.1f}",
                        flush=True,
                    )
                if not error < 10.0:
                    raise FloatingPointError(f"the autoencoder diverged at step {stage.step}")
        stage.count_time()


@torch.no_grad()
def encode_all(
    vae: AutoencoderKLQwenImage, scenes: SceneBatch, *, batch_size: int, compiled: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents of all scenes, normalised and in bf16 on the device, with the mean and standard deviation used.

    Shapes: (N, 16, 32, 32), (16,), (16,).
    """

    def means_of(batch: SceneBatch) -> torch.Tensor:
        return encode(vae, paint(batch)[0]).chunk(2, dim=1)[0].float()

    device = scenes.background.device
    run = torch.compile(means_of) if compiled else means_of
    latents = torch.empty(len(scenes), vae.config.z_dim, 32, 32, dtype=torch.bfloat16, device=device)
    mean = std = torch.zeros(vae.config.z_dim, device=device)
    with one_frame(vae), torch.autocast(device.type, torch.bfloat16):
        for start in range(0, len(scenes), batch_size):
            means = run(scenes[slice(start, start + batch_size)])
            if start == 0:
                mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
            normalised = (means - mean[:, None, None]) / std[:, None, None]
            latents[start : start + batch_size] = normalised.to(torch.bfloat16)
    return latents, mean, std
