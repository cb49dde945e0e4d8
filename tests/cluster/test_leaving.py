"""Who leaves whom: a gateway that stops has not been left by its callers, and a caller that leaves aborts, if later."""

from __future__ import annotations

import asyncio
import concurrent.futures
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from gateway.dispatch import HAND_BACK_S
from gateway.fronts import LINGER_S
from lightloom.client import AsyncClient, Progress
from lightloom.redis_server import RedisServer, start_redis
from protos import gateway_pb2, gateway_pb2_grpc, types_pb2
from services.free_port import free_port
from tests.cluster.gateway_process import GatewayProcess, gateway
from tests.cluster.running import figures, listens, wait_for
from tests.cluster.sleeping import Stages, addresses_of

# 3 s of denoising, one after the other: the last of three is still there when a gateway has waited for its stages.
STEPS = 150


class Cluster:
    """Stages, a Redis that can be killed, and a folder for gateways."""

    def __init__(self, folder: Path, addresses: dict[str, str]) -> None:
        self.folder = folder
        self.addresses = addresses
        self.port = free_port()
        self.redis: RedisServer = self.start_redis()

    def start_redis(self) -> RedisServer:
        self.redis = start_redis(self.folder / "redis", port=self.port)
        return self.redis

    def kill_redis(self) -> None:
        # It writes its log once a second, and nothing shall be lost.
        time.sleep(1.2)
        assert self.redis.process is not None
        self.redis.process.kill()
        self.redis.process.wait()

    def gateway(self, name: str, drain_s: float = 2.0) -> Any:
        settings = {"gateway": {"drain_s": drain_s}}
        return gateway(self.folder / name, self.redis.url, self.addresses, settings=settings)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeping: Stages) -> Iterator[Cluster]:
    monkeypatch.delenv("REDIS_URL", raising=False)
    made = Cluster(tmp_path, addresses_of(sleeping))
    yield made
    made.redis.stop()
    # Gateways are gone, and with them what they had asked for.
    wait_for(lambda: not any(figures(service["metrics_port"])["in_flight"] for service in sleeping.values()))


@contextmanager
def last_of_three(at: GatewayProcess) -> Iterator[tuple[Any, str]]:
    """A running Generate call, whose request is denoised after two others; and the request's id."""
    for _ in range(2):
        at.rest.post("/v1/requests", json={"prompt": "first", "width": 64, "height": 64, "steps": STEPS})
    with grpc.insecure_channel(f"127.0.0.1:{at.grpc_port}") as channel:
        params = types_pb2.GenerationParams(prompt="last", width=64, height=64, steps=STEPS)
        call = gateway_pb2_grpc.GatewayStub(channel).Generate(gateway_pb2.GenerateRequest(params=params))
        request_id = next(call).request_id
        wait_for(lambda: state(at, request_id) == "running")
        yield call, request_id


def state(at: GatewayProcess, request_id: str) -> str:
    return str(at.rest.get(f"/v1/requests/{request_id}").json().get("state"))


def ended(at: GatewayProcess, request_id: str) -> str:
    """The state that a request has ended in."""
    going = ("queued", "running", "cancelling", "None")
    return wait_for(lambda: (found := state(at, request_id)) not in going and found, 60, 0.1)


def test_a_gateway_that_stops_aborts_nothing_of_who_follows_by_grpc(cluster: Cluster) -> None:
    with ExitStack() as stack:
        stays = stack.enter_context(cluster.gateway("stays"))
        with cluster.gateway("leaves") as leaves:
            _, request_id = stack.enter_context(last_of_three(leaves))
        assert ended(stays, request_id) == "done"


def test_who_leaves_while_redis_is_away_aborts_all_the_same(cluster: Cluster) -> None:
    with cluster.gateway("gateway") as running, last_of_three(running) as (call, request_id):
        cluster.kill_redis()
        call.cancel()
        # Longer than a call to Redis waits for it.
        time.sleep(3.0)
        cluster.start_redis()
        assert ended(running, request_id) == "cancelled"


def requests_at(at: GatewayProcess) -> list[dict[str, Any]]:
    return at.rest.get("/v1/requests").json()["data"]  # type: ignore[no-any-return]


def images_call(at: GatewayProcess) -> httpx.Response:
    # A connection of its own: the gateway's client is closed when it is stopped.
    body = {"prompt": "waits", "size": "64x64", "steps": STEPS}
    return httpx.post(f"{at.rest.base_url}/v1/images/generations", json=body, timeout=30)


def test_who_waits_at_a_gateway_that_stops_gets_the_answer_and_nobody_else_comes_in(cluster: Cluster) -> None:
    with ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor())
        leaves = stack.enter_context(cluster.gateway("gateway", drain_s=30.0))
        waits = pool.submit(images_call, leaves)
        # A client may take a second to begin: it must be in before the gateway stops.
        wait_for(lambda: any(made["state"] in ("queued", "running") for made in requests_at(leaves)))
        call, _ = stack.enter_context(last_of_three(leaves))
        leaves.process.terminate()
        wait_for(lambda: leaves.health() == 0, 5, 0.05)
        with grpc.insecure_channel(f"127.0.0.1:{leaves.grpc_port}") as channel, pytest.raises(grpc.RpcError):
            gateway_pb2_grpc.GatewayStub(channel).Models(gateway_pb2.ModelsRequest(), timeout=5)
        assert not waits.done()
        assert [event.status.state for event in call][-1] == gateway_pb2.REQUEST_STATE_DONE
        assert waits.result().status_code == 200
        # Nobody waits any more.
        assert leaves.process.wait(HAND_BACK_S + 2) == 0


def test_a_call_that_is_on_its_way_when_a_gateway_stops_is_answered(cluster: Cluster) -> None:
    with ExitStack() as stack:
        leaves = stack.enter_context(cluster.gateway("gateway", drain_s=30.0))
        calls, idle = (stack.enter_context(httpx.Client(base_url=leaves.rest.base_url)) for _ in range(2))
        for client in (calls, idle):
            assert "connection" not in client.get("/health").headers
        leaves.rest.close()
        leaves.process.terminate()
        wait_for(lambda: not listens("127.0.0.1", leaves.http_port), 5, 0.01)
        answer = calls.post("/v1/requests", json={"prompt": "late", "width": 64, "height": 64, "steps": 2})
        assert (answer.status_code, answer.headers["connection"]) == (202, "close")
        # Who has an open connection and does not call holds nobody up.
        assert leaves.process.wait(LINGER_S + HAND_BACK_S) == 0


@asynccontextmanager
async def moved_on(cluster: Cluster, how: Callable[[Any], None]) -> AsyncIterator[tuple[GatewayProcess, Any, Any]]:
    """A call of the client whose gateway has gone in the middle; the gateway that is left, and what the call told."""
    seen: list[Progress] = []
    with ExitStack() as stack:
        leaves = GatewayProcess(cluster.folder / "leaves", cluster.redis.url, cluster.addresses)
        stack.callback(leaves.ended)
        await asyncio.to_thread(wait_for, lambda: leaves.health() == 200, 60)
        stays = stack.enter_context(cluster.gateway("stays"))
        async with AsyncClient(f"ipv4:127.0.0.1:{leaves.grpc_port},127.0.0.1:{stays.grpc_port}") as client:
            size = {"width": 64, "height": 64, "steps": STEPS}
            made = asyncio.create_task(client.generate("goes on", on_progress=seen.append, **size))
            async with asyncio.timeout(60):
                while not any(progress.step > 20 for progress in seen):
                    await asyncio.sleep(0.05)
                how(leaves.process)
                told = len(seen)
                while len(seen) < told + 2 or leaves.process.poll() is None:
                    await asyncio.sleep(0.05)
            yield stays, made, seen


@pytest.mark.parametrize("how", [subprocess.Popen.terminate, subprocess.Popen.kill])
async def test_a_client_goes_on_at_another_gateway(cluster: Cluster, how: Callable[[Any], None]) -> None:
    async with moved_on(cluster, how) as (_, made, seen):
        result = await made
        assert result.data[:4] == b"\x89PNG"
        assert seen[-1].state == "done"


async def test_who_leaves_there_aborts(cluster: Cluster) -> None:
    async with moved_on(cluster, subprocess.Popen.kill) as (stays, made, seen):
        made.cancel()
        with pytest.raises(asyncio.CancelledError):
            await made
        assert await asyncio.to_thread(ended, stays, seen[0].request_id) == "cancelled"


def test_a_waiting_images_call_hears_that_its_gateway_stops(cluster: Cluster) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool, cluster.gateway("gateway") as leaves:
        calls = [pool.submit(images_call, leaves) for _ in range(2)]
        wait_for(lambda: len(requests_at(leaves)) == len(calls))
    answers = [call.result() for call in calls]
    assert [answer.status_code for answer in answers] == [503] * len(calls)
    assert {answer.json()["error"]["code"] for answer in answers} == {"not_ready"}
    assert all(answer.headers["retry-after"] == "1" for answer in answers)
