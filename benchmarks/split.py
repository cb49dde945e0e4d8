"""The split cluster against one process, on the same work and cores: `python -m benchmarks.split`.

    serial     lightloom.Local, one request after the other
    batched    the same three engines in one process, with as many clients as the cluster has
    cluster    Redis, gateway and the stages, through gRPC

Rounds of the three alternate, and each round's rates are compared with each other, so that other work on the machine
falls on all of them. Every process may use all cores; a cluster of several denoisers gives each its share
(`--threads`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.load import Work, summary, write_result
from benchmarks.serve import closed_loop
from lightloom.cluster_config import ClusterConfig, GatewayEntry, ModelEntry, parse_replicas
from lightloom.launcher import Cluster
from services.config import EngineSection

SOURCE = "demo/checkpoints/qwen_image"
WORK = Work("demo", 256, 20, 4.0)
GOALS = {"cluster_over_batched": 0.85, "cluster_over_serial": 1.15}


class OneProcess:
    """The child that `benchmarks.one_process` is."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def rate(self, clients: int, requests: int) -> float:
        """Pictures a second."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"clients": clients, "requests": requests}).encode() + b"\n")
        return requests / float(await self.line())

    async def line(self) -> str:
        """The next line that it says."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("benchmarks.one_process ended")
        return line.decode()


@asynccontextmanager
async def one_process(max_batch: int) -> AsyncIterator[OneProcess]:
    """Starts it, and ends it behind the block."""
    settings = json.dumps({"source": SOURCE, "max_batch": max_batch, "work": asdict(WORK)})
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.one_process", settings),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        child = OneProcess(process)
        await child.line()
        yield child
    finally:
        process.kill()
        await process.wait()


def cluster_config(replicas: dict[str, int], threads: int, max_batch: int) -> ClusterConfig:
    """The demo model's cluster."""
    entry = ModelEntry(
        source=SOURCE, threads=threads, engine=EngineSection(max_batch=max_batch), replicas=replicas, max_in_flight=32
    )
    return ClusterConfig(models={WORK.model: entry}, gateway=GatewayEntry(http_port=0, grpc_port=0))


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rounds."""
    replicas = parse_replicas(args.replicas)
    rounds: list[dict[str, float]] = []
    with TemporaryDirectory() as folder:
        config = cluster_config(replicas, args.threads, args.max_batch)
        async with Cluster(config, Path(folder)) as cluster, one_process(args.max_batch) as single:
            await cluster.wait_ready(300.0)
            for number in range(args.rounds + 1):
                serial = await single.rate(1, args.requests // 4)
                batched = await single.rate(args.clients, args.requests)
                outcomes, wall_s = await closed_loop(cluster.grpc_address, WORK, args.clients, args.requests)
                facts = summary(outcomes, wall_s)
                if facts["errors"]:
                    raise RuntimeError(facts["first_error"])
                print(f"serial {serial:.3f}, batched {batched:.3f}, cluster {facts['throughput_per_s']:.3f} a second")
                # The first round warms everything up.
                if number:
                    rounds.append({"serial": serial, "batched": batched, "cluster": facts["throughput_per_s"]})
    return {
        "work": {**asdict(WORK), "clients": args.clients, "requests_a_round": args.requests, "rounds": args.rounds},
        "setting": {
            "replicas": replicas,
            "threads": args.threads,
            "max_batch": args.max_batch,
            "cores": os.cpu_count(),
        },
        "goals": GOALS,
        "pictures_per_s": {name: statistics.median(one[name] for one in rounds) for name in rounds[0]},
        "cluster_over_batched": statistics.median(one["cluster"] / one["batched"] for one in rounds),
        "cluster_over_serial": statistics.median(one["cluster"] / one["serial"] for one in rounds),
        "rounds": rounds,
    }


def main() -> None:
    """Parses the command line and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16, help="pictures of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--replicas", nargs="*", default=["dit=2"], help="of the cluster's stages, as STAGE=COUNT")
    parser.add_argument("--threads", type=int, default=1, help="of each stage process of the cluster; 0: all cores")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/split_cpu.json"))
    args = parser.parse_args()
    write_result(args.json, "split", asyncio.run(measure(args)))


if __name__ == "__main__":
    main()
