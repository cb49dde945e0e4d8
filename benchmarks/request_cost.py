"""What queue, leases, fences and durable results cost a request: `python -m benchmarks.request_cost`.

One client asks a real gateway with a real Redis for one picture after the other; the stages sleep 20 ms a step. The
gateway (`benchmarks.timed_gateway`) notes how long it waits for each script and each write. `on_the_way` is what the
client waits for too: the submit (which stores, claims, leases and fences), both commits, latents and synced artifact.
What happens beside the work: the client's reading of events, step events with the lease's renewal, and the dispatcher's
looks for more to claim. Commands and bytes are what Redis itself counted, without what an idle gateway costs in that
time; steps are told apart by requests of two lengths.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import grpc
import redis

from benchmarks.load import Work, timed_request, write_result
from benchmarks.scale import WORK, Running, cluster
from benchmarks.sleeping_rank import STEP_S
from benchmarks.timed_gateway import calls_file
from protos import gateway_pb2_grpc
from services.client import CHANNEL_OPTIONS

GOAL_MS = 8.0
ON_THE_WAY = ("submit", "latents", "commit", "artifact")
BESIDE = ("follow", "beat", "claim", "command")
STEPS = (20, 120)
IDLE_S = 10.0
WARM_UP = 10


class Call(NamedTuple):
    """A line of the gateway's notes."""

    name: str
    start_ns: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Counters:
    """What Redis has counted: commands with those inside scripts, by name, its time with them, and bytes."""

    moment_s: float
    commands: Counter[str]
    busy_us: float
    bytes_in: int
    bytes_out: int

    @classmethod
    def of(cls, client: redis.Redis) -> Counters:
        """Now. What this itself costs is left out, but for a few hundred bytes."""
        rows: dict[str, Any] = client.info("commandstats")
        named = {name.removeprefix("cmdstat_"): row for name, row in rows.items() if name != "cmdstat_info"}
        stats: dict[str, Any] = client.info("stats")
        return cls(
            time.monotonic(),
            Counter({name: row["calls"] for name, row in named.items()}),
            # A script's time has that of its commands in it.
            sum(row["usec"] for name, row in named.items() if name in ("evalsha", "hgetall", "hget")),
            stats["total_net_input_bytes"],
            stats["total_net_output_bytes"],
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """Between two readings, by the second or by the request."""

    commands: float
    evalsha: float
    busy_us: float
    bytes_in: float
    bytes_out: float

    @classmethod
    def between(cls, before: Counters, after: Counters) -> Traffic:
        """In all."""
        made = after.commands - before.commands
        return cls(
            float(made.total()),
            float(made["evalsha"]),
            after.busy_us - before.busy_us,
            float(after.bytes_in - before.bytes_in),
            float(after.bytes_out - before.bytes_out),
        )

    def combined(self, other: Traffic, times: float, divisor: float = 1.0) -> Traffic:
        """(self + times * other) / divisor, figure by figure."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Traffic(*((own + times * its) / divisor for own, its in pairs))


@dataclass(frozen=True, slots=True)
class Run:
    """Requests of one length: when each ran, its time outside the stages, and Redis's traffic for one."""

    windows_ns: list[tuple[int, int]]
    outside_s: list[float]
    traffic: Traffic


async def run_requests(running: Running, work: Work, requests: int, idle: Traffic) -> Run:
    """One after the other."""
    windows, outside = [], []
    with redis.Redis.from_url(running.redis) as client:
        async with grpc.aio.insecure_channel(running.grpc, options=CHANNEL_OPTIONS) as channel:
            stub = gateway_pb2_grpc.GatewayStub(channel)
            for number in range(WARM_UP):
                await timed_request(stub, work, number, time.perf_counter())
            before = Counters.of(client)
            for number in range(requests):
                start_ns = time.time_ns()
                outcome = await timed_request(stub, work, number, time.perf_counter())
                if outcome.error:
                    raise RuntimeError(outcome.error)
                # Reading the trace behind it is the benchmark's own doing.
                windows.append((start_ns, start_ns + int(1e9 * outcome.seconds)))
                outside.append(outcome.outside_s)
            after = Counters.of(client)
    spent_s = after.moment_s - before.moment_s
    return Run(windows, outside, Traffic.between(before, after).combined(idle, -spent_s, requests))


async def idle_traffic(running: Running) -> Traffic:
    """By the second, of a gateway that has nothing to do."""
    with redis.Redis.from_url(running.redis) as client:
        before = Counters.of(client)
        await asyncio.sleep(IDLE_S)
        after = Counters.of(client)
    none = Traffic(0.0, 0.0, 0.0, 0.0, 0.0)
    return Traffic.between(before, after).combined(none, 0.0, after.moment_s - before.moment_s)


def cost(run: Run, calls: list[Call]) -> dict[str, Any]:
    """Medians over the requests, in milliseconds and calls."""
    rows = []
    for first_ns, last_ns in run.windows_ns:
        own = [call for call in calls if first_ns <= call.start_ns <= last_ns]
        rows.append({name: [call.seconds for call in own if call.name == name] for name in ON_THE_WAY + BESIDE})
    sums = [{name: 1000 * sum(seconds) for name, seconds in row.items()} for row in rows]
    on_the_way = [sum(row[name] for name in ON_THE_WAY) for row in sums]
    return {
        "on_the_way_ms": statistics.median(on_the_way),
        "on_the_way_p95_ms": statistics.quantiles(on_the_way, n=20)[-1],
        "beside_ms": statistics.median(sum(row[name] for name in BESIDE) for row in sums),
        "outside_the_stages_ms": 1000 * statistics.median(run.outside_s),
        "each_ms": {name: statistics.median(row[name] for row in sums) for name in ON_THE_WAY + BESIDE},
        "calls": {name: statistics.fmean(len(row[name]) for row in rows) for name in ON_THE_WAY + BESIDE},
    }


async def measure(requests: int) -> dict[str, Any]:
    """All figures."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        async with cluster(folder, 1, gateway_module="benchmarks.timed_gateway") as running:
            idle = await idle_traffic(running)
            short, long = [
                await run_requests(running, replace(WORK, steps=steps), requests // divisor, idle)
                for steps, divisor in zip(STEPS, (1, 5), strict=True)
            ]
        lines = calls_file(folder / "gateway.toml").read_text().splitlines()
    calls = [Call(*json.loads(line)) for line in lines]
    return {
        "work": {**asdict(WORK), "step_s": STEP_S, "requests": requests},
        "goal_ms": GOAL_MS,
        "cost": cost(short, calls),
        "redis_a_request": asdict(short.traffic),
        "redis_a_step": asdict(long.traffic.combined(short.traffic, -1.0, STEPS[1] - STEPS[0])),
        "redis_idle_a_second": asdict(idle),
    }


def main() -> None:
    """Parses the command line and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/request_cost_cpu.json"))
    args = parser.parse_args()
    write_result(args.json, "request_cost", asyncio.run(measure(args.requests)))


if __name__ == "__main__":
    main()
