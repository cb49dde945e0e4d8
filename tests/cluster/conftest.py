"""A whole cluster of real processes, once for the session: Redis, two DiT replicas, text encoder, VAE, two gateways."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from lightloom.cluster_config import load_cluster
from lightloom.launcher import Cluster

CONFIG = Path(__file__).parents[2] / "deploy/config/demo.toml"


class RunningCluster:
    """A Cluster on an event loop of its own thread, for tests that are plain functions."""

    def __init__(self, run_dir: Path, replicas: dict[str, int], gateways: int) -> None:
        config = load_cluster(CONFIG)
        gateway = replace(config.gateway, http_port=0, grpc_port=0, replicas=gateways)
        models = {name: replace(entry, replicas=replicas, threads=1) for name, entry in config.models.items()}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.cluster = self.run(self._make(replace(config, gateway=gateway, models=models), run_dir))

    async def _make(self, config, run_dir):
        return Cluster(config, run_dir)

    def run(self, work, timeout_s: float = 240.0):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def start(self) -> None:
        self.run(self.cluster.start())
        self.run(self.cluster.wait_ready(200.0))

    def stop(self) -> None:
        self.run(self.cluster.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def pid(self, name_start: str) -> int:
        [pid, *_] = [row["pid"] for row in self.cluster.status() if row["name"].startswith(name_start)]
        return pid


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory, monkeypatch_session):
    running = RunningCluster(tmp_path_factory.mktemp("run"), {"dit": 2}, gateways=2)
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def monkeypatch_session():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        yield patch
