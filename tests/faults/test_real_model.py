"""A real model under faults: what comes out is what comes out without them, bit for bit with batches of one."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis
from PIL import Image

from gateway.records import LEASES
from lightloom.launcher import Cluster
from services.config import EngineSection
from tests.cluster.running import RunningCluster, wait_for
from tests.faults.checker import check, pictures
from tests.faults.clients import Clients, Recipe
from tests.faults.final_state import collect
from tests.faults.history import History, Line, Recorder, read_lines

RECIPES = [Recipe(f"a small red circle, number {number}", seed=number, steps=20, side_px=128) for number in range(3)]
# Of 255: what another order of the sums in a batch may change.
TOLERANCE = 2
LEASE_S = 2.0


class ShortLeases(Cluster):
    """A fifth of the usual ones: what a killed gateway had waits for their end."""

    async def _spawn(self, name, module, table):
        if module == "gateway":
            table["gateway"]["lease_s"] = LEASE_S
        return await super()._spawn(name, module, table)


class RealCluster(RunningCluster):
    """Two denoisers and two gateways on the demo model."""

    def __init__(self, run_dir: Path, max_batch: int) -> None:
        self._max_batch = max_batch
        super().__init__(run_dir, {"dit": 2}, gateways=2)

    async def _make(self, config, run_dir):
        engine = EngineSection(max_batch=self._max_batch)
        models = {name: replace(entry, engine=engine) for name, entry in config.models.items()}
        return ShortLeases(replace(config, models=models), run_dir)

    def urls(self) -> list[str]:
        """Of both gateways."""
        return [f"http://127.0.0.1:{self.settings(name)['gateway']['http_port']}" for name in self.names("gateway")]

    def kill(self, name: str) -> None:
        """SIGKILL."""
        os.kill(self.pid(name), signal.SIGKILL)

    def left(self) -> list[str]:
        """Leases, and what stages and store hold."""
        with redis.Redis.from_url(self.redis_url) as store:
            return [f"lease of {member}" for member in store.zrange(LEASES, 0, -1)] + self.leftovers()

    def history(self, records: Path) -> History:
        """All that is known once nothing is held any more."""
        wait_for(lambda: not self.left(), 60)
        lines = read_lines([records])
        ids = [line["id"] for line in lines if line["kind"] == "ok" and line["op"] == "submit"]
        return History(lines, [], [], collect(self.redis_url, self.run_dir / "artifacts", ids, self.left()))


@pytest.mark.parametrize("max_batch", [1, 8])
async def test_pictures_survive_dead_workers_and_gateways(tmp_path, monkeypatch, max_batch):
    monkeypatch.chdir(Path(__file__).parents[2])
    cluster = RealCluster(tmp_path, max_batch)
    try:
        await asyncio.to_thread(cluster.start)
        calm = await _run(cluster, tmp_path / "calm.jsonl", faults=False)
        stormy = await _run(cluster, tmp_path / "stormy.jsonl", faults=True)
    finally:
        await asyncio.to_thread(cluster.stop)
    reference = {name: sha256 for name, [sha256] in pictures(calm).items()}
    # What shares a batch changes the order of sums: then pictures are near each other, not the same bytes.
    found = [
        violation for violation in check(stormy, reference=reference) if max_batch == 1 or violation.invariant != "I7"
    ]
    assert check(calm) == found == []
    store = tmp_path / "artifacts/artifacts"
    expected = {line["recipe"]["seed"]: _pixels(store, calm, name) for name, line in calm.accepted.items()}
    for name, line in stormy.accepted.items():
        assert np.abs(_pixels(store, stormy, name) - expected[line["recipe"]["seed"]]).max() <= TOLERANCE
    # Without a fault a request comes into work twice: for its denoiser and for its VAE.
    assert any(_times_in_work(request) > 2 for request in stormy.final["requests"].values())


def _times_in_work(request: Line) -> int:
    return sum(event["state"] == "running" for event in request["events"])


async def _run(cluster: RealCluster, records: Path, *, faults: bool) -> History:
    async with Clients(cluster.urls(), Recorder(records), str(records)) as clients:
        if not faults:
            for recipe in RECIPES:
                assert await clients.run(recipe) == "done"
            return await asyncio.to_thread(cluster.history, records)
        tasks = [asyncio.create_task(clients.run(recipe, gateway=number)) for number, recipe in enumerate(3 * RECIPES)]
        steps = await asyncio.to_thread(cluster.steps)
        await asyncio.to_thread(wait_for, lambda: cluster.steps() > steps + 3)
        for name in (cluster.names("dit")[0], "gateway-1", cluster.names("vae")[0]):
            cluster.kill(name)
        await asyncio.gather(*tasks)
        return await asyncio.to_thread(cluster.history, records)


def _pixels(store: Path, history: History, request_id: str) -> np.ndarray:
    return np.asarray(Image.open(store / history.final["requests"][request_id]["file"]).convert("RGB")).astype(int)
