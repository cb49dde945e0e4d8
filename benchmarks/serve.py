"""Load on a running gateway: `python -m benchmarks.serve --address HOST:PORT`.

Open loop (`--rate`, `--duration`): requests arrive by a Poisson process whether or not earlier ones are done, and
latency counts from the planned arrival, so a slow server cannot hide behind its clients. Prints goodput (requests
a second within `--slo`) with p50 and p95. Closed loop (`--clients`, `--requests`): each client waits for its picture
before it asks for the next; this shows time outside the stages and the highest throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from pathlib import Path

import grpc

from benchmarks.load import Outcome, Work, summary, timed_request, write_result
from protos import gateway_pb2_grpc
from services.client import CHANNEL_OPTIONS


async def open_loop(
    address: str, work: Work, rate_per_s: float, duration_s: float, seed: int
) -> tuple[list[Outcome], float]:
    """Poisson arrivals; returns when the last request has ended."""
    generator = random.Random(seed)
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = gateway_pb2_grpc.GatewayStub(channel)
        start_s = time.perf_counter()
        arrival_s = start_s
        tasks: list[asyncio.Task[Outcome]] = []
        while True:
            arrival_s += generator.expovariate(rate_per_s)
            if arrival_s > start_s + duration_s:
                break
            await asyncio.sleep(max(0.0, arrival_s - time.perf_counter()))
            tasks.append(asyncio.create_task(timed_request(stub, work, len(tasks), arrival_s)))
        outcomes = list(await asyncio.gather(*tasks))
        return outcomes, time.perf_counter() - start_s


async def closed_loop(address: str, work: Work, clients: int, requests: int) -> tuple[list[Outcome], float]:
    """`clients` at a time, `requests` in all, each client on a channel of its own."""
    numbers = iter(range(requests))
    outcomes: list[Outcome] = []

    async def client() -> None:
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            stub = gateway_pb2_grpc.GatewayStub(channel)
            for index in numbers:
                outcomes.append(await timed_request(stub, work, index, time.perf_counter()))

    start_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes, time.perf_counter() - start_s


def main() -> None:
    """Parses the command line and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:8081", help="gRPC address of a gateway")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--size", type=int, default=256, help="side of the picture in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--rate", type=float, help="open loop: arrivals a second")
    parser.add_argument("--duration", type=float, default=60.0, help="open loop: seconds of arrivals")
    parser.add_argument("--slo", type=float, default=10.0, help="open loop: seconds within which a picture counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="closed loop: numbers of clients")
    parser.add_argument("--requests", type=int, default=64, help="closed loop: requests for each number of clients")
    parser.add_argument("--json", type=Path, help="file to keep the figures in")
    args = parser.parse_args()
    work = Work(args.model, args.size, args.steps, args.guidance)
    if args.rate:
        outcomes, wall_s = asyncio.run(open_loop(args.address, work, args.rate, args.duration, args.seed))
        facts = {"work": work, "rate_per_s": args.rate, "open_loop": summary(outcomes, wall_s, args.slo)}
    else:
        facts = {"work": work, "closed_loop": {}}
        for clients in args.clients:
            outcomes, wall_s = asyncio.run(closed_loop(args.address, work, clients, args.requests))
            facts["closed_loop"][str(clients)] = summary(outcomes, wall_s)
    write_result(args.json, "serve", facts)


if __name__ == "__main__":
    main()
