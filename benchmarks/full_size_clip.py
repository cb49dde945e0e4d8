"""Wan 2.2 T2V A14B at full size on one GPU, as a cluster: 480p, 81 frames, guidance by two branches.

`python -m benchmarks.full_size_clip` prints seconds a step, of the decode and end to end, and the time outside of the
stages: that in which none works on the request. Random weights in bfloat16, compiled blocks; one expert of 14 B waits
in the host's memory. A rehearsal without a GPU: `--source FOLDER --device cpu --width 64 --height 64 --frames 9`.

Outside are queues, hops, Redis, the gateway, the file's way to the disk and to the client, and what passes in a
denoiser between two steps. Not outside is the making of the file: frames are encoded in the VAE's service while later
ones are decoded, and while the encoder alone works, which the decoder then waits for, that is the VAE's work. Raw
frames need no encoder and are the most to carry (97 MB); mp4 is what clients mostly ask for, and needs PyAV.

With fewer steps than a clip should have, `of_40_steps` says what a request of 40 would take: the median of the
measured steps for each that is missing, and the time between two steps as often. That is extrapolated, not measured.

`--experts-apart` puts each expert into a denoiser of its own, and none into the host's memory: the request goes from
one to the other with a checkpoint. A GPU of 80 GB then has room for clips of about 33 frames.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from benchmarks.full_size import print_logs
from benchmarks.full_size_setting import clip_options, note
from benchmarks.load import Outcome, Work, timed_request, write_result
from lightloom.cluster_config import ClusterConfig, ExpertEntry, GatewayEntry, ModelEntry
from lightloom.launcher import Cluster
from protos import gateway_pb2_grpc
from services.client import CHANNEL_OPTIONS
from services.config import EngineSection
from services.wire import OUTPUT_FORMATS

# FLOPs of both branches over the measured matmul and attention ceilings of one H100 (docs/performance.md).
FLOOR_STEP_S = 4.95
READY_TIMEOUT_S = 400.0
# Both experts: the last of three steps is the second one's.
WARMUP_STEPS = 3
WHOLE_STEPS = 40


def cluster_of(args: argparse.Namespace) -> ClusterConfig:
    """One replica of each stage on one device."""
    on_gpu = args.device != "cpu"
    entry = ModelEntry(
        source=args.source,
        family="wan" if args.source.startswith("random:") else "",
        preset="wan2.2-t2v-a14b" if args.source.startswith("random:") else "",
        device=args.device,
        engine=EngineSection(offload_experts=on_gpu and not args.experts_apart),
        experts={"high_noise": ExpertEntry(), "low_noise": ExpertEntry()} if args.experts_apart else {},
        features={"attention": {}, "compile": {}} if on_gpu else {},
    )
    return ClusterConfig(models={"wan": entry}, gateway=GatewayEntry(http_port=0, grpc_port=0))


async def run_clips(args: argparse.Namespace) -> dict[str, Any]:
    """One short request to warm up, then the measured ones of each format."""
    more = {"width": args.width, "num_frames": args.frames}
    asked = [
        Work("wan", args.height, args.steps, 4.0, 1200.0, more | {"output_format": OUTPUT_FORMATS[name]})
        for name in args.formats
        for _ in range(args.runs)
    ]
    outcomes: list[Outcome] = []
    async with Cluster(cluster_of(args), args.run_dir) as cluster:
        try:
            await cluster.wait_ready(READY_TIMEOUT_S)
            note("ready")
            async with grpc.aio.insecure_channel(cluster.grpc_address, options=CHANNEL_OPTIONS) as channel:
                stub = gateway_pb2_grpc.GatewayStub(channel)
                for index, work in enumerate([replace(asked[0], steps=WARMUP_STEPS), *asked]):
                    outcomes.append(await timed_request(stub, work, index, time.perf_counter()))
                    note(str(outcomes[-1]))
                    if outcomes[-1].error:
                        raise RuntimeError(f"the cluster failed: {outcomes[-1].error}")
        except Exception:
            print_logs(cluster.run_dir / "logs")
            raise
    return {
        "work": {name: getattr(args, name) for name in ("width", "height", "frames", "steps", "formats", "runs")},
        "floor_step_s": FLOOR_STEP_S,
        "formats": {
            name: figures(outcomes[1 + args.runs * number :][: args.runs], args.steps)
            for number, name in enumerate(args.formats)
        },
    }


def figures(measured: list[Outcome], steps: int) -> dict[str, Any]:
    """Of the requests of one format: that with the median time outside."""
    one = sorted(measured, key=lambda outcome: outcome.outside_s)[len(measured) // 2]
    parts = parts_of(one)
    step_s = statistics.median(one.step_s)
    missing = WHOLE_STEPS - steps
    outside_s = one.outside_s + missing * parts["between_steps"] / steps
    whole_s = one.seconds + missing * (step_s + parts["between_steps"] / steps)
    return {
        "step_s": step_s,
        "steps_s": one.step_s,
        "end_to_end_s": one.seconds,
        "outside_s": one.outside_s,
        "outside_parts_s": parts,
        "of_40_steps": {
            "extrapolated": missing != 0,
            "end_to_end_s": whole_s,
            "outside_s": outside_s,
            "outside_share": outside_s / whole_s,
        },
        "each_outside_s": [outcome.outside_s for outcome in measured],
        "busy_s": one.busy_s,
        "spans": one.spans,
    }


def parts_of(outcome: Outcome) -> dict[str, float]:
    """What the time outside consists of, in seconds: by the timeline, which the gateway begins with its claim.

    `between_steps` and `vae_waits` pass in a rank, for the text encoder it is nothing. `store` is the file's way to the
    disk, `client` the rest before and behind the timeline: submit, commit, and the file's way to the client.
    """
    inside_s: dict[str, float] = defaultdict(float)
    for name, _, length_ms in outcome.spans:
        # A request over two experts is in two denoisers.
        inside_s[name] += length_ms / 1000
    stored_s = max(start_ms + length_ms for _, start_ms, length_ms in outcome.spans) / 1000
    parts = {
        "between_steps": inside_s["dit.denoise"] - outcome.busy_s["dit"],
        "vae_waits": inside_s["vae.decode"] - outcome.busy_s["vae"],
        "store": inside_s["gateway.store"],
        "client": outcome.seconds - stored_s,
    }
    return parts | {"hops": outcome.outside_s - sum(parts.values())}


def main() -> None:
    """Prints the figures."""
    parser = clip_options(__doc__, steps=40)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--experts-apart", action="store_true", help="each in a denoiser of its own, on one device")
    parser.add_argument("--formats", nargs="+", choices=("raw", "mp4", "gif", "zip"), default=["raw"])
    parser.add_argument("--run-dir", type=Path, default=Path("run/full_size_clip"))
    args = parser.parse_args()
    write_result(args.json, "full_size_clip", asyncio.run(run_clips(args)))


if __name__ == "__main__":
    main()
