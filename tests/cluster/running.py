"""A cluster of real processes under test: Redis, stages and gateways, and what tests want to know of them."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

from lightloom.cluster_config import load_cluster, write_toml
from lightloom.launcher import Cluster
from services.config import read_toml

CONFIG = Path(__file__).parents[2] / "deploy/config/demo.toml"
# Figures of a stage that are 0 when it has nothing to do.
HELD = ("in_flight", "rank_dit_live_tensors", "rank_dit_requests", "rank_vae_waiting", "rank_text_waiting")
T = TypeVar("T")


def listens(address: str, port: int) -> bool:
    """Whether somebody takes connections there."""
    try:
        socket.create_connection((address, port), 5).close()
    except ConnectionRefusedError:
        return False
    return True


def cluster_file(folder: Path, source: str, http_port: int = 0, more: str = "") -> Path:
    """A cluster of one model; its gRPC port is a free one, and that of HTTP where it is 0."""
    path = folder / "cluster.toml"
    path.write_text(
        f'[gateway]\nhttp_port = {http_port}\ngrpc_port = 0\n[models.demo]\nsource = "{source}"\nthreads = 1\n'
        f"[models.demo.limits]\ndefault_width = 256\ndefault_height = 256\n{more}\n"
    )
    return path


def wait_for(condition: Callable[[], T], timeout_s: float = 20.0, every_s: float = 0.02) -> T:
    """The condition's value once it is true."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if value := condition():
            return value
        time.sleep(every_s)
    raise AssertionError(f"it did not happen within {timeout_s:.0f} s: {condition()!r}")


def figures(port: int) -> dict[str, float]:
    """A metrics page: every plain figure by its name without `lightloom_`."""
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text.splitlines()
    plain = (line.rsplit(" ", 1) for line in lines if line.startswith("lightloom_") and "{" not in line)
    return {name.removeprefix("lightloom_"): float(value) for name, value in plain}


class RunningCluster:
    """A Cluster on an event loop of its own thread, for tests that are plain functions."""

    def __init__(self, run_dir: Path, replicas: dict[str, int], gateways: int, file: Path = CONFIG) -> None:
        config = load_cluster(file)
        gateway = replace(config.gateway, http_port=0, grpc_port=0, replicas=gateways)
        models = {name: replace(entry, replicas=replicas, threads=1) for name, entry in config.models.items()}
        self.run_dir = run_dir
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.cluster = self.run(self._make(replace(config, gateway=gateway, models=models), run_dir))

    async def _make(self, config, run_dir):
        return Cluster(config, run_dir)

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 240.0) -> T:
        """Runs a coroutine on the cluster's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def start(self) -> None:
        """Returns when every model is ready."""
        self.run(self.cluster.open())
        self.run(self.cluster.start())
        self.run(self.cluster.wait_ready(200.0))

    def stop(self) -> None:
        """No process is left."""
        self.run(self.cluster.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @property
    def base_url(self) -> str:
        """Of the first gateway's REST front."""
        return f"http://{self.cluster.http_address}"

    @property
    def redis_url(self) -> str:
        """Of the cluster's own Redis."""
        assert self.cluster._redis is not None
        return self.cluster._redis.url

    def names(self, stage: str) -> list[str]:
        """The processes of a stage, or the gateways."""
        return [row["name"] for row in self.cluster.status() if row["name"].startswith(f"{stage}-")]

    def pid(self, name: str) -> int:
        """Of a process; 0 while it is started again."""
        [pid] = [row["pid"] for row in self.cluster.status() if row["name"] == name]
        return pid

    def address(self, name: str) -> str:
        """host:port of a stage process."""
        [address] = [row["address"] for row in self.cluster.status() if row["name"] == name]
        return address

    def settings(self, name: str) -> dict[str, Any]:
        """The config that a process was started with."""
        return read_toml(self.run_dir / "config" / f"{name}.toml")

    def rank(self, name: str) -> psutil.Process:
        """The rank process of a stage process."""
        [rank] = psutil.Process(self.pid(name)).children()
        return rank

    def figures(self, name: str) -> dict[str, float]:
        """What a stage process says of itself now."""
        return figures(self.settings(name)["service"]["metrics_port"])

    def steps(self) -> float:
        """Denoise steps made so far, by all replicas."""
        return sum(self.figures(name)["rank_dit_steps_total"] for name in self.names("dit"))

    def leftovers(self) -> list[str]:
        """What requests hold now: slots, tensors, jobs, latents and half-written files. Empty when all is well."""
        held = []
        for stage in ("text_encoder", "dit", "vae"):
            for name in self.names(stage):
                now = self.figures(name)
                kinds = (
                    "in_flight",
                    "rank_dit_live_tensors",
                    "rank_dit_requests",
                    "rank_vae_waiting",
                    "rank_text_waiting",
                )
                held += [f"{name}: {kind} {now[kind]:.0f}" for kind in kinds if now.get(kind)]
        store = self.run_dir / "artifacts"
        return held + [str(path) for path in (*store.glob("latents/*"), *store.rglob("*.part"))]


@contextmanager
def serving(folder: Path, table: dict[str, Any]) -> Iterator[RunningCluster]:
    """One gateway and one replica of each stage of what a cluster file of that table names; `folder` is its own."""
    file = folder / "cluster.toml"
    write_toml(file, table)
    running = RunningCluster(folder / "run", {}, gateways=1, file=file)
    try:
        running.start()
        yield running
    finally:
        running.stop()
