"""Wan 2.2 T2V A14B at full size on one GPU, as a cluster: 480p, 81 frames, guidance by two branches.

`python -m benchmarks.full_size_clip` prints seconds a step, of the decode and end to end, and what of it no rank worked
on the request. Random weights in bfloat16, compiled blocks; one expert of 14 B waits in the host's memory. The clip
leaves as raw frames, so that no encoder is needed: `--format mp4` where PyAV is installed. A rehearsal without a GPU:
`--source FOLDER --device cpu --width 64 --height 64 --frames 9 --steps 4`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from benchmarks.full_size import print_logs
from benchmarks.full_size_setting import note
from benchmarks.load import Outcome, Work, timed_request, write_result
from lightloom.cluster_config import ClusterConfig, GatewayEntry, ModelEntry
from lightloom.launcher import Cluster
from protos import gateway_pb2_grpc
from services.client import CHANNEL_OPTIONS
from services.config import EngineSection
from services.wire import OUTPUT_FORMATS

# FLOPs of both branches over the measured matmul and attention ceilings of one H100 (docs/performance.md).
FLOOR_STEP_S = 4.95
READY_TIMEOUT_S = 400.0
# Both experts, each of them compiled on its first step.
WARMUP_STEPS = 4


def cluster_of(args: argparse.Namespace) -> ClusterConfig:
    """One replica of each stage on one device."""
    on_gpu = args.device != "cpu"
    entry = ModelEntry(
        source=args.source,
        family="wan" if args.source.startswith("random:") else "",
        preset="wan2.2-t2v-a14b" if args.source.startswith("random:") else "",
        device=args.device,
        engine=EngineSection(offload_experts=on_gpu),
        features={"attention": {}, "compile": {}} if on_gpu else {},
    )
    return ClusterConfig(models={"wan": entry}, gateway=GatewayEntry(http_port=0, grpc_port=0))


async def run_clips(args: argparse.Namespace) -> dict[str, Any]:
    """One short request to warm up, then the measured ones."""
    more = {"width": args.width, "num_frames": args.frames, "output_format": OUTPUT_FORMATS[args.format]}
    work = Work("wan", args.height, args.steps, 4.0, 1200.0, more)
    outcomes: list[Outcome] = []
    async with Cluster(cluster_of(args), args.run_dir) as cluster:
        try:
            await cluster.wait_ready(READY_TIMEOUT_S)
            note("ready")
            async with grpc.aio.insecure_channel(cluster.grpc_address, options=CHANNEL_OPTIONS) as channel:
                stub = gateway_pb2_grpc.GatewayStub(channel)
                for index in range(args.runs + 1):
                    asked = work if index else replace(work, steps=WARMUP_STEPS)
                    outcomes.append(await timed_request(stub, asked, index, time.perf_counter()))
                    note(str(outcomes[-1]))
                    if outcomes[-1].error:
                        raise RuntimeError(f"the cluster failed: {outcomes[-1].error}")
        except Exception:
            print_logs(cluster.run_dir / "logs")
            raise
    measured = outcomes[1:]
    seconds, outside_s = (statistics.median(getattr(o, name) for o in measured) for name in ("seconds", "outside_s"))
    return {
        "work": {name: getattr(args, name) for name in ("width", "height", "frames", "steps", "format", "runs")},
        "floor_step_s": FLOOR_STEP_S,
        "step_s": statistics.median(o.busy_s["dit"] for o in measured) / args.steps,
        "end_to_end_s": seconds,
        "outside_s": outside_s,
        "outside_share": outside_s / seconds,
        "busy_s": measured[-1].busy_s,
        "spans": measured[-1].spans,
    }


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="random:0", help="weights: random:SEED or a folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--format", choices=("raw", "mp4", "zip"), default="raw")
    parser.add_argument("--run-dir", type=Path, default=Path("run/full_size_clip"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    write_result(args.json, "full_size_clip", asyncio.run(run_clips(args)))


if __name__ == "__main__":
    main()
