"""Frame interpolation: what its pictures are worth, and how fast they are made.

    python -m benchmarks.interpolation --device cpu --clips DIR --photographs DIR --no-speed   # quality, on any machine
    python -m benchmarks.interpolation --json benchmarks/results/interpolation_h100.json       # speed, on a GPU

Quality: every second frame of real clips is hidden and made of its neighbours (`benchmarks/interpolation_quality.py`);
with `--photographs`, moving layers of held-out photographs too. Speed: a clip of 480p from 81 to 161 frames as the
service makes it, chunks of frames in and chunks out, with and without encoding the MP4, in several settings; against a
loop over single pairs in float32, of which each picture must be the same. A part that fails is kept with its error.
Rehearsal: `--device cpu --frames 5 --width 96 --height 64 --repeats 1`.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.interpolation_quality import clip_figures, photograph_figures
from benchmarks.load import write_result
from interpolation_svc.between import pictures_between
from interpolation_svc.clip import Clip
from interpolation_svc.ifnet import MULTIPLE_PX, V4_22_LITE, IFNet
from interpolation_svc.weights import PACKAGED, load_ifnet
from services.clip_writer import ClipWriter

VAE_FRAMES = 4
"""A VAE's chunk: what comes of one latent frame."""
FPS = 16.0


@dataclass(frozen=True)
class Setting:
    """How the service could run: dtype of the convolutions, their layout, pictures a batch, compiled or not."""

    dtype: str
    batch: int
    channels_last: bool = True
    compiled: bool = False


SETTINGS = {
    "service": Setting("bfloat16", 8),
    "fp16": Setting("float16", 8),
    "batch 4": Setting("bfloat16", 4),
    "batch 16": Setting("bfloat16", 16),
    "rows": Setting("bfloat16", 8, channels_last=False),
    "fp32": Setting("float32", 8),
    "compiled": Setting("bfloat16", 8, compiled=True),
}


def main() -> None:
    """Parses the command line, measures, prints and keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="default: those that ship; without any, random ones of 4.22.lite")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--clips", type=Path, help="folder of .mp4 files, or one")
    parser.add_argument("--pairs", type=int, default=1000, help="hidden frames of each clip at most, spread over it")
    parser.add_argument("--photographs", type=Path, help="folder with scikit-image's pictures")
    parser.add_argument("--judged", type=int, default=256, help="clips of moving layers")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--only", choices=SETTINGS, action="append", help="settings to time; default: all")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    weights = args.weights or (PACKAGED if PACKAGED.exists() else None)
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "weights": weights.name if weights else "random, 4.22.lite",
    }
    with torch.inference_mode():
        if args.clips:
            net = load(weights, device)
            facts["clips"] = attempted(lambda: clip_figures(net, args.clips, args.pairs))
        if args.photographs:
            net = load(weights, device)
            facts["photographs"] = attempted(lambda: photograph_figures(net, args.photographs, args.judged))
        if not args.no_speed:
            facts["speed"] = speed(weights, device, args)
    write_result(args.json, "interpolation", facts)


def attempted(measure: Callable[[], Any]) -> Any:
    """What it measures, or the error that it ended with."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - the other parts are measured all the same
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def load(weights: Path | None, device: torch.device, setting: Setting | None = None) -> IFNet:
    """The network as the service has it; without a setting in float32."""
    dtype = getattr(torch, setting.dtype) if setting else torch.float32
    if weights is None:
        torch.manual_seed(0)
        net = IFNet(V4_22_LITE).eval().requires_grad_(False).to(dtype)
    else:
        net = load_ifnet(weights, dtype)
    net = net.to(device)
    if setting is None or setting.channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if setting and setting.compiled:
        net.compile(dynamic=False)
    return net


def speed(weights: Path | None, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the first frame in to the last frame out, the best of the repeats."""
    frames = moving_picture(args.frames, args.width, args.height)
    facts: dict[str, Any] = {"frames": args.frames, "width": args.width, "height": args.height, "settings": {}}
    net = load(weights, device)
    loop_s, theirs = best_of(args.repeats, lambda: pair_by_pair(net, frames))
    facts["pair_by_pair_fp32_s"] = round(loop_s, 3)
    print(f"single pairs in fp32: {loop_s:.3f} s", flush=True)
    for name in args.only or SETTINGS:
        row = attempted(partial(timed, weights, device, SETTINGS[name], args.repeats, frames, theirs))
        facts["settings"][name] = row
        print(f"{name}: {row}", flush=True)
    return facts


def timed(
    weights: Path | None,
    device: torch.device,
    setting: Setting,
    repeats: int,
    frames: torch.Tensor,
    theirs: torch.Tensor,
) -> dict[str, Any]:
    """One setting: seconds, seconds with the MP4 encoded beside it, and how far its pictures are from the loop's."""
    net = load(weights, device, setting)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, out = best_of(repeats, lambda: torch.cat(list(interpolated(net, setting.batch, frames))))
    count = 2 * len(frames) - 1
    with_mp4 = attempted(
        lambda: round(best_of(repeats, lambda: encoded(interpolated(net, setting.batch, frames), count))[0], 3)
    )
    apart = (out.int() - theirs.int()).abs()
    return {
        "s": round(seconds, 3),
        "with_mp4_s": with_mp4,
        "frames_out": len(out),
        "apart_max": int(apart.max()),
        "apart_mean": round(apart.float().mean().item(), 4),
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None,
    }


def interpolated(net: IFNet, batch: int, frames: torch.Tensor) -> Iterator[torch.Tensor]:
    """As the service does it: the VAE's chunks in, the first of one frame."""
    clip = Clip(net, 1, 1.0, batch)
    for some in (frames[:1], *frames[1:].split(VAE_FRAMES)):
        yield from clip.add(some)


def encoded(chunks: Iterator[torch.Tensor], count: int) -> bytes:
    """The MP4 of a clip, encoded while it is made."""
    writer = ClipWriter("mp4", 90, 2 * FPS, count)
    try:
        for chunk in chunks:
            writer.add(chunk.numpy())
        return writer.finish()[1]
    finally:
        writer.close()


def pair_by_pair(net: IFNet, frames: torch.Tensor) -> torch.Tensor:
    """The plain way: a pair after the other, both pictures encoded each time, in float32."""
    device = next(net.parameters()).device
    height, width = frames.shape[1:3]
    out: list[torch.Tensor] = [frames[0]]
    for first, second in zip(frames[:-1], frames[1:], strict=True):
        pictures = torch.stack([first, second]).to(device).permute(0, 3, 1, 2).float() / 255
        padded = F.pad(pictures, (0, -width % MULTIPLE_PX, 0, -height % MULTIPLE_PX), mode="replicate")
        planes = net.encode_pictures(padded)
        middle = torch.tensor([0.5], device=device)
        picture = pictures_between(net, planes[:1], planes[1:], middle)[0, :, :height, :width]
        out += [(picture * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu(), second]
    return torch.stack(out)


def best_of(repeats: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """The shortest time, after one run that does not count. All work ends on the CPU."""
    result, seconds = work(), []
    for _ in range(repeats):
        start_s = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start_s)
    return min(seconds), result


def moving_picture(count: int, width: int, height: int) -> torch.Tensor:
    """A view that wanders over a large picture, three pixels a frame: uint8 [F, H, W, 3]."""
    generator = torch.Generator().manual_seed(0)
    octaves: Sequence[int] = (4, 16, 64)
    size = (height + count, width + 3 * count)
    noise = [torch.rand(1, 3, *(max(2, side // octave) for side in size), generator=generator) for octave in octaves]
    picture = sum(F.interpolate(x, size, mode="bilinear") for x in noise) / len(noise)
    assert isinstance(picture, torch.Tensor)
    pixels = (255 * picture[0]).to(torch.uint8).permute(1, 2, 0)
    return torch.stack([pixels[i : i + height, 3 * i : 3 * i + width] for i in range(count)])


if __name__ == "__main__":
    main()
