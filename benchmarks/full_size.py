"""Qwen-Image at full size on one GPU: diffusers' own pipeline and the cluster, on the same random weights.

`python -m benchmarks.full_size` runs both one after the other, each in processes of its own, and prints seconds per
step and end to end beside the floor (docs/performance.md). 1024x1024, guidance by two branches, bfloat16; the peer has
its blocks compiled and cuDNN attention. `--only stock` or `--only cluster` runs one of them. A rehearsal without a GPU:
`--source demo/checkpoints/qwen_image --device cpu --side 256 --steps 4`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc

from benchmarks.full_size_setting import Setting, Timing, note
from benchmarks.load import Outcome, Work, timed_request, write_result
from lightloom.cluster_config import ClusterConfig, GatewayEntry, ModelEntry
from lightloom.launcher import Cluster
from protos import gateway_pb2_grpc
from services.client import CHANNEL_OPTIONS
from services.errors import StartupError

# FLOPs of one forward at 1024x1024 over the measured matmul and attention ceilings of one H100.
FLOOR_FORWARD_MS = 97.0
READY_TIMEOUT_S = 300.0
LOG_TAIL_CHARS = 1500


async def run_cluster(setting: Setting, run_dir: Path) -> tuple[Timing, dict[str, Any]]:
    """Gateway and the three services on one device, through gRPC."""
    entry = ModelEntry(
        source=setting.source,
        family=setting.family,
        preset=setting.preset,
        device=setting.device,
        features={"attention": {}, "compile": {}},
    )
    config = ClusterConfig(models={"qwen": entry}, gateway=GatewayEntry(http_port=0, grpc_port=0))
    started_s = time.perf_counter()
    async with Cluster(config, run_dir) as cluster:
        note("processes started")
        try:
            await cluster.wait_ready(READY_TIMEOUT_S)
        except StartupError:
            print_logs(cluster.run_dir / "logs")
            raise
        ready_s = time.perf_counter() - started_s
        note(f"ready after {ready_s:.1f} s")
        outcomes = await _pictures(cluster.grpc_address, setting)
    failed = [outcome.error for outcome in outcomes if outcome.error]
    if failed:
        print_logs(cluster.run_dir / "logs")
        raise RuntimeError(f"the cluster failed: {failed[0]}")
    return _figures(outcomes[1:], setting, ready_s)


async def _pictures(address: str, setting: Setting) -> list[Outcome]:
    work = Work("qwen", setting.side_px, setting.steps, setting.guidance)
    outcomes = []
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = gateway_pb2_grpc.GatewayStub(channel)
        for index in range(setting.runs + 1):
            outcomes.append(await timed_request(stub, work, index, time.perf_counter()))
            note(str(outcomes[-1]))
    return outcomes


def _figures(measured: list[Outcome], setting: Setting, ready_s: float) -> tuple[Timing, dict[str, Any]]:
    timing = Timing(
        statistics.median(o.seconds for o in measured),
        statistics.median(o.busy_s["dit"] for o in measured) / setting.steps,
        setting.runs,
    )
    outside_s = statistics.median(o.outside_s for o in measured)
    facts = {
        "ready_s": ready_s,
        "busy_s": measured[-1].busy_s,
        "outside_s": outside_s,
        "outside_share": outside_s / timing.end_to_end_s,
        "between_steps_s": statistics.median(o.turns_s for o in measured),
        "spans": measured[-1].spans,
    }
    return timing, facts


def print_logs(folder: Path) -> None:
    """The end of every process's log."""
    for path in sorted(folder.glob("*.jsonl")):
        print(f"--- {path.name}\n{path.read_text(errors='replace')[-LOG_TAIL_CHARS:]}", flush=True)


def _child(side: str, setting: Setting, run_dir: Path) -> dict[str, Any]:
    note(f"{side} starts")
    with TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        options = {
            "source": setting.source,
            "device": setting.device,
            "side": setting.side_px,
            "steps": setting.steps,
            "runs": setting.runs,
            "run-dir": run_dir,
            "json": result,
            "only": side,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "benchmarks.full_size", *words], check=True)
        facts: dict[str, Any] = json.loads(result.read_text())
        return facts


def main() -> None:
    """Runs both sides, or one, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="random:0", help="weights: random:SEED or a folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--side", type=int, default=1024, help="side of the picture in pixels")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--only", choices=("stock", "cluster"))
    parser.add_argument("--run-dir", type=Path, default=Path("run/full_size"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    setting = Setting(args.source, args.device, args.side, args.steps, args.runs)
    if args.only == "stock":
        from benchmarks.full_size_stock import run_stock

        facts: dict[str, Any] = asdict(run_stock(setting))
    elif args.only == "cluster":
        timing, more = asyncio.run(run_cluster(setting, args.run_dir))
        facts = asdict(timing) | more
    else:
        facts = {
            "work": asdict(setting),
            "floor_step_s": 2 * FLOOR_FORWARD_MS / 1000,
            "cluster": _child("cluster", setting, args.run_dir),
            "stock": _child("stock", setting, args.run_dir),
        }
    write_result(args.json, "full_size", facts)


if __name__ == "__main__":
    main()
