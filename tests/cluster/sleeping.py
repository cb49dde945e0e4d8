"""Stages that sleep instead of computing (`benchmarks.sleeping_rank`), and a whole cluster of them with one gateway.

For tests of what goes on around the stages: it is there in seconds, and a step takes no core.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.scale import WORK, stage_table
from lightloom.cluster_config import write_toml
from services.config import environment_with_malloc
from services.free_port import free_port
from tests.cluster.gateway_process import ROOT, GatewayProcess, gateway
from tests.cluster.redis_process import own_redis
from tests.cluster.running import figures, wait_for


@contextmanager
def sleeping_stage(
    folder: Path, stage: str, max_in_flight: int, *, model: str = WORK.model, port: int = 0
) -> Iterator[dict[str, int]]:
    """A stage that sleeps instead of computing; gives its ports."""
    table = stage_table(stage, port or free_port())
    table["service"] |= {"metrics_port": free_port(), "max_in_flight": max_in_flight}
    table["model"]["name"] = model
    path = folder / f"{stage}-{model}.toml"
    write_toml(path, table)
    command = [sys.executable, "-m", "benchmarks.sleeping_stage", "--config", str(path)]
    with path.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment_with_malloc())
    try:
        yield table["service"]
    finally:
        process.terminate()
        process.wait(20)


def ready(metrics_port: int) -> bool:
    """Whether a stage serves."""
    try:
        return figures(metrics_port)["ready"] == 1.0
    except httpx.TransportError:
        return False


Stages = Mapping[str, Mapping[str, int]]


@contextmanager
def sleeping_stages(folder: Path, slots: Mapping[str, int]) -> Iterator[Stages]:
    """One replica of each stage, ready; gives the ports of each."""
    with ExitStack() as stack:
        stages = {name: stack.enter_context(sleeping_stage(folder, name, most)) for name, most in slots.items()}
        wait_for(lambda: all(ready(service["metrics_port"]) for service in stages.values()), 200)
        yield stages


def addresses_of(stages: Stages) -> dict[str, str]:
    """Where gateways find them."""
    return {name: f"127.0.0.1:{service['port']}" for name, service in stages.items()}


@dataclass(frozen=True)
class SleepingCluster:
    """Redis, and what else a gateway needs to serve the stages."""

    redis_url: str
    addresses: dict[str, str]


@contextmanager
def sleeping_cluster(folder: Path, stages: Stages) -> Iterator[SleepingCluster]:
    """Without a gateway: tests start their own. The stages may serve others too, one after the other."""
    with own_redis(folder) as url:
        yield SleepingCluster(url, addresses_of(stages))


@contextmanager
def sleeping_gateway(folder: Path, stages: Stages, **options: Any) -> Iterator[GatewayProcess]:
    """A gateway with a cluster of its own; options as GatewayProcess."""
    with (
        sleeping_cluster(folder, stages) as cluster,
        gateway(folder / "gateway", cluster.redis_url, cluster.addresses, **options) as running,
    ):
        yield running
