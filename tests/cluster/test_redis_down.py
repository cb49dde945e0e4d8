"""Redis away: at the start, killed and frozen while requests run. New requests are refused soon, running ones go on."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import redis

from lightloom import Client
from lightloom.redis_server import RedisServer, start_redis
from services.errors import StateStoreDown
from services.free_port import free_port
from tests.cluster.gateway_process import GatewayProcess, gateway
from tests.cluster.running import RunningCluster, wait_for

STAGES = ("text_encoder", "dit", "vae")
# 2 s on an idle machine.
SOON_S = 10.0
BODY = {"prompt": "a red circle", "steps": 60}
IMAGE = {**BODY, "size": "128x128"}


@dataclass
class Store:
    """A Redis that can go away and come back with what it held."""

    folder: Path
    port: int
    server: RedisServer | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.server = start_redis(self.folder, port=self.port)

    def process(self) -> psutil.Process:
        assert self.server is not None and self.server.process is not None
        return psutil.Process(self.server.process.pid)

    def kill(self) -> None:
        # It writes its log once a second; what was asked of it before must not be lost in the test.
        time.sleep(1.2)
        self.process().kill()
        assert self.server is not None and self.server.process is not None
        self.server.process.wait()

    @contextlib.contextmanager
    def killed(self) -> Iterator[None]:
        self.kill()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        self.process().suspend()
        try:
            yield
        finally:
            self.process().resume()


@pytest.fixture
def store(tmp_path, monkeypatch) -> Iterator[Store]:
    monkeypatch.delenv("REDIS_URL", raising=False)
    made = Store(tmp_path / "redis", free_port())
    yield made
    if made.server is not None:
        made.server.stop()


@pytest.fixture
def honest(running_cluster: RunningCluster) -> dict[str, str]:
    return {stage: running_cluster.address(running_cluster.names(stage)[0]) for stage in STAGES}


def generate(running: GatewayProcess) -> bytes:
    with Client(f"127.0.0.1:{running.grpc_port}") as client:
        return client.generate("a blue star", steps=60, width=128, height=128).data


def check_refusals(running: GatewayProcess) -> None:
    """Every call that needs Redis says within seconds that it is away."""
    calls = [
        ("POST", "/v1/images/generations", IMAGE),
        ("POST", "/v1/requests", BODY),
        ("GET", "/v1/requests", None),
        ("GET", "/v1/requests/some", None),
        ("GET", "/v1/requests/some/events", None),
        ("DELETE", "/v1/requests/some", None),
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as pool, Client(f"127.0.0.1:{running.grpc_port}") as client:
        started_s = time.monotonic()
        answers = [pool.submit(running.rest.request, method, path, json=body) for method, path, body in calls]
        health = pool.submit(running.rest.get, "/health")
        with pytest.raises(StateStoreDown):
            client.generate("a cat")
        for answer in answers:
            assert answer.result().status_code == 503, answer.result().text
            assert answer.result().json()["error"]["code"] == "state_store_down"
        assert (health.result().status_code, health.result().json()["redis"]) == (503, False)
        assert time.monotonic() - started_s < SOON_S


def test_a_gateway_that_starts_before_redis_recovers_by_itself(store, honest, tmp_path):
    with gateway(tmp_path, store.url, honest, ready=503) as running:
        wait_for(lambda: running.rest.get("/v1/models").json()["data"])
        check_refusals(running)
        store.start()
        wait_for(lambda: running.health() == 200)
        assert running.rest.post("/v1/images/generations", json=IMAGE).status_code == 200


@pytest.mark.parametrize("way", [Store.killed, Store.frozen], ids=lambda way: way.__name__)
def test_redis_goes_away_while_requests_run(store, honest, running_cluster, tmp_path, way):
    store.start()
    with (
        gateway(tmp_path, store.url, honest) as running,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        # Long enough that they are still denoised when Redis goes, and short enough to end while it is away.
        waiting = pool.submit(running.rest.post, "/v1/images/generations", json=IMAGE)
        following = pool.submit(generate, running)
        wait_for(lambda: sum(item["step"] > 0 for item in running.rest.get("/v1/requests").json()["data"]) == 2)
        with way(store):
            check_refusals(running)
            time.sleep(2.0)
        assert waiting.result(60).status_code == 200, waiting.result().text
        assert following.result(60)
        wait_for(lambda: running.health() == 200)

        def listed() -> list[dict]:
            return running.rest.get("/v1/requests").json()["data"]

        # What was refused does not run later, out of the buffers of a Redis that had only stood still.
        wait_for(lambda: {item["state"] for item in listed()} <= {"done", "cancelled"})
        done = [item for item in listed() if item["state"] == "done"]
        # Nobody had to begin again: what was denoised while Redis was away counts.
        assert [item["attempt"] for item in done] == [1, 1]
        assert all(item["step"] == 0 for item in listed() if item["state"] == "cancelled")
        assert running.rest.post("/v1/images/generations", json=IMAGE).status_code == 200
        assert len(list((running.store / "artifacts").glob("*.json"))) == 3
        assert not list((running.store / "latents").iterdir())
    wait_for(lambda: not running_cluster.leftovers())


def test_a_redis_that_is_full_refuses_and_the_gateway_lives(store, honest, tmp_path):
    store.start()
    with (
        gateway(tmp_path, store.url, honest) as running,
        redis.Redis.from_url(store.url) as administrator,
    ):
        administrator.config_set("maxmemory", 1)
        refused = running.rest.post("/v1/requests", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "state_store_down")
        health = running.rest.get("/health")
        assert (health.status_code, health.json()["redis"]) == (503, False)
        administrator.config_set("maxmemory", 0)
        assert running.rest.get("/health").status_code == 200
        assert running.rest.post("/v1/images/generations", json=IMAGE).status_code == 200
        assert "maxmemory" in running.log.read_text()
