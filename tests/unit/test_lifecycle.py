"""What owners of a request leave in the artifact store, on a real Redis."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.config import GatewaySection
from gateway.dispatch import Dispatcher
from gateway.lifecycle import Lifecycle
from gateway.replicas import Replicas
from gateway.requests import RequestService
from gateway.state import State, queue_key
from gateway.store import Store
from gateway.work import Work
from lightloom.redis_server import start_redis
from protos import gateway_pb2, types_pb2

QUEUE = queue_key("dit", "d")
NO_REPLICAS = cast(Replicas, None)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = start_redis(Path(tmp_path_factory.mktemp("redis")))
    yield server.url
    server.stop()


class Decoded:
    """A Decode call that has ended."""

    def __init__(self, data: bytes) -> None:
        self.artifact = gateway_pb2.Artifact(mime="image/png")
        self.start_unix_ns = time.time_ns()
        self._data = data

    async def media(self) -> bytes:
        return self._data

    async def ended(self) -> types_pb2.StageUsage:
        return types_pb2.StageUsage()


class Gateway:
    """One that owns requests and finishes them."""

    def __init__(self, url: str, folder: Path) -> None:
        self.folder = folder
        self.state = State(url, "gateway")
        self.store = Store(folder)
        self.lifecycle = Lifecycle(self.state, NO_REPLICAS, self.store, GatewaySection(), "gateway")
        dispatcher = Dispatcher(self.state, NO_REPLICAS, self.lifecycle, GatewaySection())
        self.service = RequestService(self.state, dispatcher, NO_REPLICAS, self.store, GatewaySection())

    async def submit(self, request_id: str) -> None:
        fields: dict[str, Any] = {"params": b"", "deadline": time.time() + 60, "traceparent": ""}
        await self.state.submit(request_id, QUEUE, priority=0, max_queued=9, keep_s=60, fields=fields)

    async def claim(self, lease_s: float) -> Work:
        claim = await self.state.claim((QUEUE,), lease_s)
        assert claim is not None
        return Work.of(claim)

    async def finish(self, work: Work, data: bytes) -> None:
        await self.lifecycle._finish(work, cast(Any, Decoded(data)))

    def files(self) -> set[str]:
        return {path.name for kind in ("artifacts", "latents") for path in (self.folder / kind).iterdir()}


@pytest.fixture
async def two(url: str, tmp_path: Path) -> AsyncIterator[tuple[Gateway, Gateway]]:
    gateways = Gateway(url, tmp_path), Gateway(url, tmp_path)
    await gateways[0].state._redis.flushall()
    yield gateways
    for gateway in gateways:
        await gateway.state.close()


@pytest.mark.parametrize("stale_first", [True, False])
async def test_a_stale_owner_leaves_the_artifact_of_a_done_request_alone(two, stale_first: bool) -> None:
    own, other = two
    await own.submit("r")
    stale = await own.claim(lease_s=0.0)
    await other.lifecycle.take_away("r", b"e")
    owner = await other.claim(lease_s=10.0)
    if stale_first:
        await own.finish(stale, b"stale")
        assert own.files() == set()
    await other.finish(owner, b"good")
    if not stale_first:
        await own.store.put_latents("r", [b"stale"])
        await own.finish(stale, b"stale")
    assert own.files() == {owner.artifact_name, f"{owner.artifact_name}.json"}
    for gateway in two:
        artifact, path = await gateway.service.artifact("r")
        assert path.read_bytes() == b"good" and artifact.nbytes == 4
        assert await gateway.service.content(await gateway.service.get("r")) == b"good"


async def test_what_a_dead_owner_wrote_goes_when_its_request_is_taken_away(two) -> None:
    own, other = two
    await own.submit("r")
    dead = await own.claim(lease_s=0.0)
    await own.store.put(dead.artifact_name, b"dead", gateway_pb2.Artifact())
    assert len(own.files()) == 2
    await other.lifecycle.take_away("r", b"e")
    assert own.files() == set()


async def test_a_result_whose_commit_was_not_answered_is_kept(two) -> None:
    own, _ = two
    await own.submit("r")
    work = await own.claim(lease_s=10.0)
    await own.finish(work, b"good")
    # As when a beat meanwhile says that the request is not ours any more.
    await own.lifecycle._cancelled(work)
    assert own.files() == {work.artifact_name, f"{work.artifact_name}.json"}
