"""Aborts of running requests: how soon work stops, and what stays behind. `python -m benchmarks.aborts`.

Starts a cluster with the demo model and aborts requests at random steps, one after the other, of several sizes. After
each, the denoiser's count of live tensors must return to 0. Every tenth abort is timed: from the abort's call to the
last step that the rank counted. The rank tells its figures every 0.1 s, so a time is up to 0.1 s too long, never too
short. Memory is the resident set of the denoiser's rank process; what counts is its growth from the 100th abort on.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.load import percentile, write_result
from lightloom.client import AsyncClient
from lightloom.cluster_config import load_cluster
from lightloom.launcher import Cluster
from services.config import read_toml

CONFIG = Path("deploy/config/demo.toml")
SIDES_PX = (128, 192, 256)
STEPS = 200
LAST_STEP_BEFORE_ABORT = 6
POLL_S = 0.005
SETTLE_S = 0.6
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Denoiser:
    """A DiT replica: its metrics page and its rank process."""

    metrics_port: int
    rank_pid: int

    def figures(self) -> dict[str, float]:
        """Its plain figures, by name."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as page:
            lines = page.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("lightloom_rank_") and "{" not in line)
        return {name.removeprefix("lightloom_rank_"): float(value) for name, value in pairs}

    @property
    def resident_bytes(self) -> int:
        """Of the rank process."""
        return int(psutil.Process(self.rank_pid).memory_info().rss)


@dataclass(slots=True)
class Aborts:
    """What was seen. `stopped_s` and `step_s` belong to the timed aborts; `resident` is bytes after each abort."""

    stopped_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    live_tensors_left: float = 0.0

    @property
    def late_s(self) -> list[float]:
        """By how much work went on for longer than one step."""
        return [stopped - step for stopped, step in zip(self.stopped_s, self.step_s, strict=True)]

    def growth(self, first: int, last: int) -> float:
        """Of resident memory from one abort to another (counted from 1), as a share."""
        return self.resident[last - 1] / self.resident[first - 1] - 1


async def abort_many(
    client: AsyncClient, denoisers: Sequence[Denoiser], count: int, *, timed_every: int = 10, seed: int = 0
) -> Aborts:
    """Submits and aborts `count` requests, one after the other.

    Raises:
        TimeoutError: live tensors did not return to 0 within 5 s of an abort.
    """
    randomness, seen = random.Random(seed), Aborts()
    for index in range(count):
        side = randomness.choice(SIDES_PX)
        prompt = "a red circle " * randomness.randint(1, 8)
        request_id = await client.submit(f"{prompt}{index}", width=side, height=side, steps=STEPS)
        await _until_step(client, request_id, randomness.randint(1, LAST_STEP_BEFORE_ABORT))
        before = await _figures(denoisers)
        aborted_s = time.monotonic()
        await client.abort(request_id)
        if index % timed_every == 0:
            seen.stopped_s.append(await _last_step_s(denoisers, aborted_s, before["dit_steps_total"]))
            seen.step_s.append(await _step_s(denoisers))
        async with asyncio.timeout(5.0):
            while seen_now := (await _figures(denoisers))["dit_live_tensors"]:
                seen.live_tensors_left = seen_now
                await asyncio.sleep(POLL_S)
        seen.live_tensors_left = 0.0
        seen.resident.append(sum(denoiser.resident_bytes for denoiser in denoisers))
    return seen


async def _until_step(client: AsyncClient, request_id: str, step: int) -> None:
    async for progress in client.watch(request_id):
        if progress.step >= step:
            return


async def _figures(denoisers: Sequence[Denoiser]) -> dict[str, float]:
    """Sums over the replicas."""
    pages = await asyncio.gather(*(asyncio.to_thread(denoiser.figures) for denoiser in denoisers))
    return {name: sum(page[name] for page in pages) for name in pages[0]}


async def _last_step_s(denoisers: Sequence[Denoiser], aborted_s: float, steps: float) -> float:
    """Seconds from the abort to the last change of the step counter."""
    last_s = aborted_s
    while time.monotonic() < max(aborted_s, last_s) + SETTLE_S:
        now = (await _figures(denoisers))["dit_steps_total"]
        if now != steps:
            steps, last_s = now, time.monotonic()
        await asyncio.sleep(POLL_S)
    return last_s - aborted_s


async def _step_s(denoisers: Sequence[Denoiser]) -> float:
    """Mean seconds of a step since the start."""
    now = await _figures(denoisers)
    return now["dit_busy_seconds_total"] / max(1.0, now["dit_ticks_total"])


def denoisers_of(cluster: Cluster) -> list[Denoiser]:
    """The DiT replicas of a cluster on this machine."""
    found = []
    for row in cluster.status():
        if row["name"].startswith("dit-"):
            settings = read_toml(cluster.run_dir / "config" / f"{row['name']}.toml")
            [rank] = psutil.Process(row["pid"]).children()
            found.append(Denoiser(settings["service"]["metrics_port"], rank.pid))
    return found


def summary(seen: Aborts) -> dict[str, Any]:
    """Plain numbers: milliseconds, MiB, shares."""
    count = len(seen.resident)
    marks = [mark for mark in (1, 100, 200, 300) if mark <= count]
    return {
        "aborts": count,
        "timed": len(seen.stopped_s),
        "step_ms_median": 1000 * statistics.median(seen.step_s),
        "stopped_after_ms_median": 1000 * statistics.median(seen.stopped_s),
        "stopped_after_ms_p95": 1000 * percentile(seen.stopped_s, 95),
        "stopped_after_ms_max": 1000 * max(seen.stopped_s),
        "later_than_a_step_ms_max": 1000 * max(seen.late_s),
        "live_tensors_left": seen.live_tensors_left,
        "resident_mib": {str(mark): seen.resident[mark - 1] / MIB for mark in marks},
        "growth_100_to_300": seen.growth(100, 300) if count >= 300 else None,
    }


async def measure(count: int, run_dir: Path) -> Aborts:
    """Starts a cluster on free ports and aborts `count` requests."""
    config = load_cluster(CONFIG)
    config = replace(config, gateway=replace(config.gateway, http_port=0, grpc_port=0))
    async with Cluster(config, run_dir) as cluster:
        await cluster.wait_ready()
        async with AsyncClient(cluster.grpc_address) as client:
            return await abort_many(client, denoisers_of(cluster), count)


def main() -> None:
    """Parses the command line and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aborts", type=int, default=300)
    parser.add_argument("--json", type=Path, help="file to keep the figures in")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = asyncio.run(measure(args.aborts, Path(folder)))
    write_result(args.json, "aborts", summary(seen))


if __name__ == "__main__":
    main()
