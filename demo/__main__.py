"""`make demo`: starts a cluster, draws one picture from a prompt, judges it, and stops everything.

Prints where the picture is, whether it shows what the prompt says, and the seconds of every stage.
"""

from __future__ import annotations

import asyncio
import io
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from demo.parse import parse
from demo.scorer import score
from lightloom.client import AsyncClient, Progress, Result
from lightloom.cluster_config import load_cluster
from lightloom.launcher import Cluster
from lightloom.up import Reporter
from services.errors import ServiceError, StartupError

CONFIG = Path("deploy/config/demo.toml")
RUN_DIR = Path(".lightloom/demo")
OUTPUT = Path("out/demo.png")
SEED = 7


async def run(prompt: str, console: Console) -> bool:
    """Whether the picture agrees with the prompt (True also when nobody can tell)."""
    config = load_cluster(CONFIG)
    config = replace(config, gateway=replace(config.gateway, http_port=0, grpc_port=0))
    started_s = time.perf_counter()
    console.print("starting Redis, text encoder, DiT, VAE and gateway")
    async with Cluster(config, RUN_DIR) as cluster:
        reporter = Reporter(cluster, console)
        reports = asyncio.create_task(reporter.run())
        try:
            await cluster.wait_ready(300.0)
            await reporter.report()
        finally:
            reports.cancel()
        ready_s = time.perf_counter() - started_s
        console.print(f"cluster ready after {ready_s:.1f} s")
        begun_s = time.perf_counter()
        with console.status("queued") as status:

            def show(progress: Progress) -> None:
                status.update(f"{progress.state}: step {progress.step} of {progress.total}")

            async with AsyncClient(cluster.grpc_address) as client:
                result = await client.generate(prompt, model="demo", seed=SEED, on_progress=show)
        seconds = time.perf_counter() - begun_s
    _report(prompt, result, seconds, console)
    return _judge(prompt, result, console)


def _report(prompt: str, result: Result, seconds: float, console: Console) -> None:
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    result.save(OUTPUT)
    console.print(f'"{prompt}"')
    console.print(f"[bold]{OUTPUT.absolute()}[/]  {result.width}x{result.height}, seed {result.seed}")
    for stage in ("text_encoder", "dit", "vae"):
        console.print(f"  {stage:<14}{result.busy_s.get(stage, 0.0):6.3f} s")
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


def main() -> None:
    """Exit code 1 when the picture is wrong, 2 when nothing could start."""
    if len(sys.argv) != 2:
        raise SystemExit('usage: python -m demo "PROMPT"')
    try:
        agrees = asyncio.run(run(sys.argv[1], Console()))
    except (StartupError, ServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0 if agrees else 1)


if __name__ == "__main__":
    main()
