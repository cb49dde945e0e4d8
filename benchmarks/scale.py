"""How throughput grows with denoiser replicas: `python -m benchmarks.scale`.

The engine sleeps 20 ms a step and serves one request after the other (`benchmarks.sleeping_rank`), so it takes no core,
and everything around it shows: Redis, gateway, fronts, channels. Clients ask again as soon as they have an answer. At
the end, 200 clients at once: which share of what the engines can do is used.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc

from benchmarks.load import Work, timed_request, write_result
from benchmarks.sleeping_rank import STEP_S
from lightloom.cluster_config import write_toml
from lightloom.redis_server import start_redis
from protos import gateway_pb2, gateway_pb2_grpc
from services.client import CHANNEL_OPTIONS
from services.config import environment_with_malloc
from services.free_port import free_port

WORK = Work("sleeping", 256, 20, 4.0)
REPLICAS = (1, 2, 4)
CLIENTS_A_REPLICA = 4
CROWD = 200
GOALS = {"2": 1.9, "4": 3.7}


@asynccontextmanager
async def process(folder: Path, name: str, module: str, table: dict[str, Any]) -> AsyncIterator[None]:
    """A process of the cluster, for the length of the block."""
    path = folder / f"{name}.toml"
    write_toml(path, table)
    with (folder / f"{name}.log").open("wb") as log:
        started = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, "--config", str(path)),
            stdout=log,
            stderr=log,
            env=environment_with_malloc(),
        )
    try:
        yield
    finally:
        started.terminate()
        await started.wait()


def stage_table(stage: str, port: int) -> dict[str, Any]:
    """The config of a sleeping stage."""
    return {
        "service": {"port": port, "name": f"{stage}-{port}", "max_in_flight": 64},
        "model": {"name": WORK.model, "source": "random:0", "preset": stage},
    }


@dataclass(frozen=True, slots=True)
class Running:
    """Addresses: of a gateway, `host:port` of gRPC and the base URL of REST; of its Redis, the URL."""

    grpc: str
    http: str
    redis: str


@asynccontextmanager
async def cluster(
    folder: Path,
    replicas: int,
    *,
    stage_module: str = "benchmarks.sleeping_stage",
    gateway_module: str = "gateway",
    keys_file: Path | None = None,
    api_key: str = "",
) -> AsyncIterator[Running]:
    """Redis, a gateway and sleeping stages; yields the gateway once the model is ready.

    Args:
        keys_file: the gateway takes calls with its keys only; `api_key` is one of them.
    """
    ports = {"text_encoder": [free_port()], "vae": [free_port()], "dit": [free_port() for _ in range(replicas)]}
    redis = await asyncio.to_thread(start_redis, folder / "redis")
    grpc_port, http_port = free_port(), free_port()
    running = Running(f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}", redis.url)
    gateway = {
        "gateway": {"grpc_port": grpc_port, "http_port": http_port},
        "access": {"keys_file": "" if keys_file is None else str(keys_file)},
        "redis": {"url": redis.url},
        "store": {"path": str(folder / "artifacts")},
        "stages": {
            stage: "static:" + ",".join(f"127.0.0.1:{port}" for port in listed) for stage, listed in ports.items()
        },
    }
    try:
        async with AsyncExitStack() as stack:
            for stage, listed in ports.items():
                for port in listed:
                    table = stage_table(stage, port)
                    await stack.enter_async_context(process(folder, table["service"]["name"], stage_module, table))
            await stack.enter_async_context(process(folder, "gateway", gateway_module, gateway))
            await _ready(running.grpc, api_key, sum(len(listed) for listed in ports.values()))
            yield running
    finally:
        redis.stop()


async def _ready(address: str, api_key: str, replicas: int) -> None:
    async with asyncio.timeout(60), grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = gateway_pb2_grpc.GatewayStub(channel)
        while True:
            metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
            answer = await stub.Models(gateway_pb2.ModelsRequest(), wait_for_ready=True, metadata=metadata)
            if [sum(replica.healthy for replica in model.replicas) for model in answer.models] == [replicas]:
                return
            await asyncio.sleep(0.1)


async def rate(address: str, clients: int, warm_up_s: float, seconds: float) -> float:
    """Answers a second, of a closed loop."""
    ended: list[float] = []
    stop_s = time.perf_counter() + warm_up_s + seconds

    async def client(number: int) -> None:
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            stub = gateway_pb2_grpc.GatewayStub(channel)
            while time.perf_counter() < stop_s:
                outcome = await timed_request(stub, WORK, number, time.perf_counter())
                if outcome.error:
                    raise RuntimeError(outcome.error)
                ended.append(time.perf_counter())

    await asyncio.gather(*(client(number) for number in range(clients)))
    counted = sorted(moment for moment in ended if stop_s - seconds <= moment <= stop_s)
    # The slope, because replicas may answer in step: a count between two moments would depend on where they fall.
    return statistics.linear_regression(counted, range(len(counted))).slope


async def measure(warm_up_s: float, seconds: float) -> dict[str, Any]:
    """The rate for every number of replicas."""
    rates: dict[str, float] = {}
    for replicas in REPLICAS:
        with TemporaryDirectory() as name:
            async with cluster(Path(name), replicas) as running:
                rates[str(replicas)] = await rate(running.grpc, CLIENTS_A_REPLICA * replicas, warm_up_s, seconds)
        print(f"{replicas} replicas: {rates[str(replicas)]:.2f} requests a second", flush=True)
    most = REPLICAS[-1]
    with TemporaryDirectory() as name:
        async with cluster(Path(name), most) as running:
            crowd = await rate(running.grpc, CROWD, warm_up_s, seconds)
    alone = rates[str(REPLICAS[0])]
    return {
        "work": {**asdict(WORK), "step_s": STEP_S, "seconds": seconds, "clients_a_replica": CLIENTS_A_REPLICA},
        "goals": GOALS,
        "requests_per_s": rates,
        "ideal_requests_per_s": {str(count): count / (WORK.steps * STEP_S) for count in REPLICAS},
        "crowd": {"clients": CROWD, "replicas": most, "busy_share": crowd * WORK.steps * STEP_S / most, "goal": 0.95},
        "times_one_replica": {count: value / alone for count, value in rates.items()},
    }


def main() -> None:
    """Parses the command line and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, for each number of replicas")
    parser.add_argument("--warm-up", type=float, default=3.0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/scale_cpu.json"))
    args = parser.parse_args()
    write_result(args.json, "scale", asyncio.run(measure(args.warm_up, args.seconds)))


if __name__ == "__main__":
    main()
