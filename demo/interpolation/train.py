"""Trains the frame interpolator: `python -m demo.interpolation.train --photographs DIR --out FILE --minutes 9`.

Clips are drawn as they are needed, where the training runs. Their true flow is known, so every block of the network is
told both the picture and the flow. With `--as-served`, for the last minutes of a training (`--start-from`), what counts
is the picture that the service makes of the last block's. With `--state`, the same command goes on where an earlier one
stopped. On several GPUs of a machine, each with batches of its own: `torchrun --standalone --nproc-per-node 4 -m ...`.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from demo import ranks
from demo.interpolation.evaluate import evaluate
from demo.interpolation.filmed import filmed
from demo.interpolation.layers import Clips, Painter, sample_clips
from demo.interpolation.photographs import HELD_OUT, TRAINING, read_tiles
from demo.stage import Stage, save_tensors
from interpolation_svc.between import COARSE_SCALE, both_ways, pictures_of
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
SERVED_FLOW_SHARE = 0.02
"""What a pixel of error in the flow counts when pictures count as they are served: it keeps blocks on their ways."""
SEEN_MSE = 1e-4
"""Added to a picture's squared error before its logarithm: what is as good as 40 dB need not become better."""
SAVE_EVERY_STEPS = 500


def main() -> None:
    """Parses the command line, trains, saves, evaluates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="folder with scikit-image's pictures")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint, safetensors")
    parser.add_argument("--minutes", type=float, default=9.0, help="training in all")
    parser.add_argument("--run-minutes", type=float, default=9.0, help="after which this run ends")
    parser.add_argument("--state", type=Path, help="file for what a later run goes on with")
    parser.add_argument("--start-from", type=Path, help="a checkpoint whose weights are the start")
    parser.add_argument("--as-served", action="store_true", help="the loss is that of the service's pictures")
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
    save_average(stage, args.out)
    print(f"{args.out}: {args.out.stat().st_size} bytes", flush=True)
    stage.use_average()
    painter = Painter(read_tiles(args.photographs, HELD_OUT).to(next(net.parameters()).device))
    for line in evaluate(net.eval(), painter, args.judged, args.side):
        print(line, flush=True)


def save_average(stage: Stage, path: Path) -> None:
    """The checkpoint of the weights' average so far, fp16; it replaces the former one at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({name.removeprefix("net."): value.half() for name, value in stage.ema.items()}, path)


def train(stage: Stage, net: IFNet, args: argparse.Namespace, painter: Painter) -> None:
    """Trains until the stage has had its planned seconds or this run its minutes."""
    device = painter.tiles.device
    generator = torch.Generator(device).manual_seed(stage.ranks.seed(args.seed + stage.step))
    stage.begin(60 * args.run_minutes)
    while stage.goes_on:
        clips = sample_clips(args.batch, args.side, len(painter.tiles), generator)
        triples = draw_triples(painter, clips, generator)
        loss, picture_error, flow_error = (served_loss_of if args.as_served else loss_of)(net, triples)
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
        if stage.ranks.rank == 0 and stage.step % SAVE_EVERY_STEPS == 0:
            save_average(stage, args.out)


@dataclass(frozen=True, slots=True)
class Triples:
    """Two pictures and the wanted one between them at times [N], [N, 3, S, S]; its true flow [N, 4, S, S] px."""

    first: torch.Tensor
    wanted: torch.Tensor
    second: torch.Tensor
    flow: torch.Tensor
    times: torch.Tensor


def draw_triples(painter: Painter, clips: Clips, generator: torch.Generator) -> Triples:
    """Draws clips at times at random, as films show them."""
    draws = torch.rand(2, len(clips), generator=generator, device=painter.tiles.device)
    # The middle is asked for most often; eighths are what three doublings ask for.
    times = torch.where(draws[0] < 0.5, 0.5, (1 + (7 * draws[1]).floor()) / 8)
    first, second = (painter.picture(clips, torch.full_like(times, end)) for end in (0.0, 1.0))
    wanted, flow = painter.draw(clips, times)
    return Triples(*filmed(first, wanted, second, times, generator), flow, times)


def loss_of(net: IFNet, triples: Triples) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of a batch; also, for the log, the last block's squared error and its error of the flow in px."""
    device = triples.first.device
    loss, weight = torch.zeros((), device=device), EARLIER**3
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        first, second = net.encode_pictures(triples.first), net.encode_pictures(triples.second)
        for estimate in net.estimates(first, second, triples.times):
            picture, flow_error = estimate.picture(), _distance(estimate.flow, triples.flow)
            loss = loss + weight * (pyramid_loss(picture, triples.wanted) + FLOW_SHARE * flow_error)
            weight /= EARLIER
    return loss, (picture - triples.wanted).square().mean().detach(), flow_error.detach()


def served_loss_of(net: IFNet, triples: Triples) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `loss_of`, of the pictures that the service makes: their PSNR counts, and the blocks' flow a little."""
    device = triples.first.device
    flow = torch.cat([triples.flow, triples.flow.roll(2, 1)])
    loss, weight = torch.zeros((), device=device), SERVED_FLOW_SHARE * EARLIER**3
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        first, second = net.encode_pictures(triples.first), net.encode_pictures(triples.second)
        asked = both_ways(first, second, triples.times)
        for estimate in net.estimates(*asked, coarse_scale=COARSE_SCALE):
            flow_error = _distance(estimate.flow, flow)
            loss = loss + weight * flow_error
            weight /= EARLIER
    # Of the pictures as they are: no gradient goes into them.
    made = pictures_of(estimate, triples.first, triples.second, triples.times)
    error = (made - triples.wanted).square().flatten(1).mean(1)
    return loss + (error + SEEN_MSE).log().mean(), error.mean().detach(), flow_error.detach()


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
