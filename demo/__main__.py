"""`make demo`: starts a cluster, draws one picture from a prompt, makes a clip from another, and stops everything.

Prints where picture and clip are, whether they show what the prompts say, and the seconds of every stage. The clip
comes once the video model's weights are there, and its frames are doubled once the interpolator's are.
"""

from __future__ import annotations

import asyncio
import io
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from demo.clips import captions as clip_captions
from demo.clips import scorer as clip_scorer
from demo.parse import parse
from demo.scorer import score
from lightloom.client import AsyncClient, Progress, Result
from lightloom.cluster_config import ClusterConfig, load_cluster
from lightloom.launcher import Cluster
from lightloom.up import Reporter
from services.errors import ServiceError, StartupError

CONFIG = Path("deploy/config/demo.toml")
CLIPS_CONFIG = Path("deploy/config/demo_clips.toml")
CLIPS_WEIGHTS = Path("demo/checkpoints/wan")
INTERPOLATOR_WEIGHTS = Path("interpolation_svc/weights.safetensors")
RUN_DIR = Path(".lightloom/demo")
PICTURE = Path("out/demo.png")
CLIP = Path("out/demo.mp4")
SEED = 7


async def run(prompt: str, clip_prompt: str, console: Console) -> bool:
    """Whether picture and clip agree with their prompts (True also when nobody can tell)."""
    config = cluster_config()
    started_s = time.perf_counter()
    console.print(f"starting Redis, gateway and the stages of {', '.join(config.models)}")
    async with Cluster(config, RUN_DIR) as cluster:
        reporter = Reporter(cluster, console)
        reports = asyncio.create_task(reporter.run())
        try:
            await cluster.wait_ready(300.0)
            await reporter.report()
        finally:
            reports.cancel()
        console.print(f"cluster ready after {time.perf_counter() - started_s:.1f} s")
        async with AsyncClient(cluster.grpc_address) as client:
            agrees = _judge(prompt, await _make(client, console, PICTURE, prompt, model="demo"), console)
            if "demo-clips" in config.models:
                more = {"enable_frame_interpolation": config.interpolation is not None}
                clip = await _make(client, console, CLIP, clip_prompt, model="demo-clips", **more)
                agrees &= _judge_clip(clip_prompt, clip, console)
    console.print(f"{time.perf_counter() - started_s:.1f} s in all")
    return agrees


def cluster_config() -> ClusterConfig:
    """The demo's cluster on free ports, with what there are weights for."""
    config = load_cluster(CONFIG)
    config = replace(config, gateway=replace(config.gateway, http_port=0, grpc_port=0))
    if not CLIPS_WEIGHTS.exists():
        return config
    clips = load_cluster(CLIPS_CONFIG)
    interpolation = clips.interpolation if INTERPOLATOR_WEIGHTS.exists() else None
    return replace(config, models={**config.models, **clips.models}, interpolation=interpolation)


async def _make(client: AsyncClient, console: Console, output: Path, prompt: str, **options: Any) -> Result:
    begun_s = time.perf_counter()
    with console.status("queued") as status:

        def show(progress: Progress) -> None:
            status.update(f"{progress.state}: step {progress.step} of {progress.total}")

        result = await client.generate(prompt, seed=SEED, on_progress=show, **options)
    _report(prompt, result, output, time.perf_counter() - begun_s, console)
    return result


def _report(prompt: str, result: Result, output: Path, seconds: float, console: Console) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    result.save(output)
    length = f", {result.num_frames} frames at {result.fps:g} a second" if result.num_frames > 1 else ""
    console.print(f'"{prompt}"')
    console.print(f"[bold]{output.absolute()}[/]  {result.width}x{result.height}{length}, seed {result.seed}")
    for stage in ("text_encoder", "dit", "vae"):
        console.print(f"  {stage:<14}{result.busy_s.get(stage, 0.0):6.3f} s")
    if "interpolation" in result.busy_s:
        console.print(f"  {'interpolation':<14}{result.busy_s['interpolation']:6.3f} s, while the VAE decodes")
    else:
        console.print(f"  {'outside':<14}{seconds - sum(result.busy_s.values()):6.3f} s")
    console.print(f"  {'in all':<14}{seconds:6.3f} s")


def _judge(prompt: str, result: Result, console: Console) -> bool:
    scene = parse(prompt)
    if scene is None:
        console.print("the prompt is outside the demo's world of shapes: look at the picture yourself")
        return True
    agrees = score(np.asarray(Image.open(io.BytesIO(result.data)).convert("RGB")), scene).agrees
    console.print("the picture shows what the prompt says" if agrees else "[red]the picture is wrong[/]")
    return agrees


def _judge_clip(prompt: str, result: Result, console: Console) -> bool:
    asked = clip_captions.parse(prompt)
    if asked is None:
        console.print("the prompt is outside the demo's world of moving shapes: look at the clip yourself")
        return True
    found = clip_scorer.score(frames_of(result.data), asked.scene, asked.names_speed)
    console.print("the clip shows what the prompt says" if found.agrees else "[red]the clip is wrong[/]")
    return found.agrees


def frames_of(data: bytes) -> NDArray[np.uint8]:
    """The frames of an encoded clip, (F, height, width, 3)."""
    open_container: Callable[..., Any] = av.open
    with open_container(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def main() -> None:
    """Exit code 1 when picture or clip is wrong, 2 when nothing could start."""
    if len(sys.argv) != 3 or not all(map(str.strip, sys.argv[1:])):
        raise SystemExit('usage: python -m demo "PROMPT OF THE PICTURE" "PROMPT OF THE CLIP"')
    try:
        agrees = asyncio.run(run(sys.argv[1], sys.argv[2], Console()))
    except (StartupError, ServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0 if agrees else 1)


if __name__ == "__main__":
    main()
