"""Trains the frame interpolator: `python -m demo.interpolation.train --photographs DIR --out FILE --minutes 9`.

Clips are drawn as they are needed, where the training runs. Their true flow is known, so every block of the network is
told both the picture and the flow. With `--state`, the same command goes on where an earlier one stopped.
On several GPUs of a machine, each with batches of its own: `torchrun --standalone --nproc-per-node 4 -m ...`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from demo import ranks
from demo.interpolation.evaluate import evaluate
from demo.interpolation.layers import Clips, Painter, sample_clips
from demo.interpolation.photographs import HELD_OUT, TRAINING, read_tiles
from demo.stage import Stage
from interpolation_svc.ifnet import IFNet, IFNetSpec
from interpolation_svc.weights import load_ifnet

SPEC = IFNetSpec((128, 80, 64, 32), encodes=True)
"""4.22.lite with narrower coarse blocks: 2.43 M weights, 4.9 MB as fp16."""

EMA_DECAY = 0.999
"""Runs below 9,000 steps do not get there: a stage averages a ninth of its steps so far at most."""
WARM_UP_STEPS = 100
"""Twice what Adam's second moments look back: 8 s, of a run that may take 4 minutes."""
FLOW_SHARE = 0.1
"""What a pixel of error in the flow counts, next to an error of 1 in the picture."""
EARLIER = 0.8
"""What a block counts, next to the one after it."""
PYRAMID = 5
MAX_NOISE = 0.012


def main() -> None:
    """Parses the command line, trains, saves, evaluates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="folder with scikit-image's pictures")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint, safetensors")
    parser.add_argument("--minutes", type=float, default=9.0, help="training in all")
    parser.add_argument("--run-minutes", type=float, default=9.0, help="after which this run ends")
    parser.add_argument("--state", type=Path, help="file for what a later run goes on with")
    parser.add_argument("--start-from", type=Path, help="a checkpoint whose weights are the start")
    parser.add_argument("--peak-lr", type=float, default=6e-4)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--side", type=int, default=256, help="pixels, a multiple of 32")
    parser.add_argument("--judged", type=int, default=256, help="held-out clips of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    together = ranks.join()
    device = together.device
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)  # Of the first weights: the same on all ranks.
    net: IFNet = IFNet(SPEC).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if args.start_from:
        net.load_state_dict(load_ifnet(args.start_from).state_dict())
    stage = Stage(
        nn.ModuleDict({"net": net}),
        peak_lr=args.peak_lr,
        ema_decay=EMA_DECAY,
        planned_s=60 * args.minutes,
        warm_up_steps=WARM_UP_STEPS,
        ranks=together,
    )
    if args.state and args.state.exists():
        stage.resume(args.state)
    train(stage, net, args, Painter(read_tiles(args.photographs, TRAINING).to(device)))
    ranks.leave()
    if together.rank == 0:
        finish(stage, net, args)


def finish(stage: Stage, net: IFNet, args: argparse.Namespace) -> None:
    """Saves, and says what the weights' average is worth."""
    if args.state:
        args.state.parent.mkdir(parents=True, exist_ok=True)
        stage.save(args.state)
    stage.use_average()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().cpu().contiguous() for name, tensor in net.state_dict().items()}, args.out)
    print(f"{args.out}: {args.out.stat().st_size} bytes", flush=True)
    painter = Painter(read_tiles(args.photographs, HELD_OUT).to(next(net.parameters()).device))
    for line in evaluate(net.eval(), painter, args.judged, args.side):
        print(line, flush=True)


def train(stage: Stage, net: IFNet, args: argparse.Namespace, painter: Painter) -> None:
    """Trains until the stage has had its planned seconds or this run its minutes."""
    device = painter.tiles.device
    generator = torch.Generator(device).manual_seed(stage.ranks.seed(args.seed + stage.step))
    stage.begin(60 * args.run_minutes)
    while stage.goes_on:
        clips = sample_clips(args.batch, args.side, len(painter.tiles), generator)
        loss, picture_error, flow_error = loss_of(net, painter, clips, generator)
        loss.backward()
        stage.update()
        if stage.step % 25 == 0 or device.type == "cpu":
            error = picture_error.item()  # Waits for the device, so the clock below tells the truth.
            stage.count_time()
            if stage.ranks.rank == 0 and (stage.step % 250 == 0 or stage.step <= 100):
                reached = f"loss {loss.item():.4f} psnr {-10 * math.log10(error):.2f} flow {flow_error.item():.2f} px"
                print(f"step {stage.step} {stage.seconds:.0f} s {reached}", flush=True)
            if not error < 1.0:
                raise FloatingPointError(f"training diverged at step {stage.step}")


def loss_of(
    net: IFNet, painter: Painter, clips: Clips, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of a batch; also, for the log, the last block's squared error and its error of the flow in px."""
    device = painter.tiles.device
    draws = torch.rand(2, len(clips), generator=generator, device=device)
    # The middle is asked for most often; eighths are what three doublings ask for.
    wanted = torch.where(draws[0] < 0.5, 0.5, (1 + (7 * draws[1]).floor()) / 8)
    first, second = (painter.picture(clips, torch.full_like(wanted, end)) for end in (0.0, 1.0))
    target, flow = painter.draw(clips, wanted)
    level = MAX_NOISE * torch.rand(len(clips), 1, 1, 1, generator=generator, device=device).pow(3)
    first, second = (x + level * torch.randn(x.shape, generator=generator, device=device) for x in (first, second))
    loss, weight = torch.zeros((), device=device), EARLIER**3
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        first, second = net.encode_pictures(first), net.encode_pictures(second)
        for estimate in net.estimates(first, second, wanted):
            picture, flow_error = estimate.picture(), _distance(estimate.flow, flow)
            loss = loss + weight * (pyramid_loss(picture, target) + FLOW_SHARE * flow_error)
            weight /= EARLIER
    return loss, (picture - target).square().mean().detach(), flow_error.detach()


def pyramid_loss(picture: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 between Laplacian pyramids. An octave lower counts twice as much: misplaced things differ in all."""
    error, loss = (picture - target).float(), torch.zeros((), device=picture.device)
    for octave in range(PYRAMID - 1):
        lower = F.avg_pool2d(error, 2)
        detail = error - F.interpolate(lower, scale_factor=2, mode="bilinear", align_corners=False)
        loss, error = loss + 2**octave * detail.abs().mean(), lower
    total: torch.Tensor = loss + 2 ** (PYRAMID - 1) * error.abs().mean()
    return total


def _distance(flow: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    squared: torch.Tensor = (flow - true).square().unflatten(1, (2, 2)).sum(2)
    return (squared + 0.01).sqrt().mean()


if __name__ == "__main__":
    main()
