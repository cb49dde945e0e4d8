"""What the sweep takes away and what it must leave, with a real Redis and a real folder or S3 server."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from gateway.config import RedisSection, StoreSection
from gateway.objects import KINDS
from gateway.records import Claim, queue_key
from gateway.state import State
from gateway.store import artifact_name, open_store
from gateway.sweep import Sweep
from gateway.ticket import Ticket
from lightloom.redis_server import start_redis
from protos import gateway_pb2
from services.errors import StartupError, StateStoreDown
from services.free_port import free_port
from tests.cluster.s3_process import ENVIRONMENT, s3_server

QUEUE = queue_key("dit", "d")
AGE_S, KEEP_S = 600.0, 86_400.0
LATER = float("inf")


@pytest.fixture
async def state(url: str) -> AsyncIterator[State]:
    state = State(RedisSection(url=url), "gateway")
    await state._scripts.redis.flushall()
    yield state
    await state.close()


class Swept:
    """A store with its sweep, and its files as they lie there."""

    def __init__(self, root: Path, state: State) -> None:
        self.root, self.state = root, state
        section = StoreSection(path=str(root), sweep_age_s=AGE_S)
        self.store = open_store(section)
        self.registry = CollectorRegistry()
        self._sweep = Sweep(state, self.store, section, KEEP_S, self.registry)

    async def sweep(self) -> set[str]:
        """What is left."""
        for kind in KINDS:
            await self._sweep.once(kind)
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()}

    async def put(self, request_id: str, fence: int) -> set[str]:
        name = artifact_name(request_id, fence)
        await self.store.put(name, b"data", gateway_pb2.Artifact(), LATER)
        return {f"artifacts/{name}", f"artifacts/{name}.json"}

    async def put_latents(self, request_id: str) -> set[str]:
        await self.store.put_latents(request_id, [b"latents"], LATER)
        return {f"latents/{request_id}"}

    def age(self, seconds: float) -> None:
        """Makes all that is there so old."""
        then = time.time() - seconds
        for path in self.root.rglob("*"):
            if path.is_file():
                os.utime(path, (then, then))

    def figure(self, name: str, kind: str) -> float | None:
        return self.registry.get_sample_value(name, {"kind": kind})


@pytest.fixture
def swept(tmp_path: Path, state: State) -> Swept:
    return Swept(tmp_path / "store", state)


async def submitted(state: State, request_id: str) -> Claim:
    await state.submit(request_id, QUEUE, Ticket(), {"params": b"", "traceparent": ""})
    claim = await state.claim((QUEUE,), 60.0)
    assert claim is not None and claim.request_id == request_id
    return claim


async def test_a_done_request_keeps_its_artifact_and_nothing_else(swept, state) -> None:
    claim = await submitted(state, "a")
    stale = await swept.put("a", 99)
    own = await swept.put("a", claim.fence)
    await swept.put_latents("a")
    fields = {"artifact": b"", "file": artifact_name("a", claim.fence)}
    assert await state.commit(claim, "done", "vae", "", fields) == "done"
    swept.age(AGE_S / 2)
    assert stale <= await swept.sweep()
    swept.age(2 * KEEP_S)
    assert await swept.sweep() == own
    assert swept.figure("lightloom_store_files", "artifacts") == 2
    assert swept.figure("lightloom_store_bytes", "artifacts") > 8
    assert swept.figure("lightloom_store_files", "latents") == 0
    assert swept.figure("lightloom_store_swept_total", "artifacts") == 2
    assert swept.figure("lightloom_store_swept_total", "latents") == 1


async def test_a_running_request_keeps_what_its_owner_wrote_and_its_latents(swept, state) -> None:
    first = await submitted(state, "a")
    await swept.put("a", first.fence)
    await state.requeue("a", first.fence, 3, True, b"")
    second = await state.claim((QUEUE,), 60.0)
    kept = await swept.put("a", second.fence) | await swept.put_latents("a")
    swept.age(2 * KEEP_S)
    assert await swept.sweep() == kept
    # Another owner's turn: the second one's result can never be committed any more.
    await state.requeue("a", second.fence, 3, True, b"")
    assert await swept.sweep() == {"latents/a"}


@pytest.mark.parametrize("state_name", ["failed", "cancelled"])
async def test_a_request_that_made_nothing_keeps_nothing(swept, state, state_name: str) -> None:
    claim = await submitted(state, "a")
    await swept.put("a", claim.fence)
    await swept.put_latents("a")
    if state_name == "cancelled":
        await state.abort("a")
    await state.commit(claim, state_name, "", "", {})
    swept.age(AGE_S + 1)
    assert await swept.sweep() == set()


async def test_what_has_no_record_stays_as_long_as_records_do(swept) -> None:
    """A Redis that came back empty does not empty the store."""
    everything = await swept.put("a", 1) | await swept.put_latents("a")
    swept.age(KEEP_S - 60)
    assert await swept.sweep() == everything
    swept.age(KEEP_S + 60)
    assert await swept.sweep() == set()


async def test_leftovers_of_dead_writers_go_and_what_is_not_ours_stays(swept) -> None:
    for name in ("artifacts/.a.1.0a1b.part", "latents/.a.0a1b.part", "probes/0a1b"):
        (swept.root / name).write_bytes(b"half")
    assert len(await swept.sweep()) == 3
    theirs = {"artifacts/README", "artifacts/a.txt", "artifacts/lost+found.x"}
    for name in theirs:
        (swept.root / name).write_bytes(b"theirs")
    swept.age(2 * KEEP_S)
    assert await swept.sweep() == theirs


async def test_two_sweep_at_once(swept, state) -> None:
    for number in range(20):
        await swept.put(f"a{number}", 1)
    swept.age(2 * KEEP_S)
    other = Swept(swept.root, state)
    await asyncio.gather(swept.sweep(), other.sweep())
    assert await swept.sweep() == set()


async def test_a_checkpoint_is_its_requests(swept) -> None:
    kept = {"latents/a.3.7"}
    claim = await submitted(swept.state, "a")
    await swept.put_latents("a.3.7")
    swept.age(2 * AGE_S)
    assert await swept.sweep() == kept
    await swept.state.commit(claim, "failed", "", "", {})
    swept.age(2 * AGE_S)
    assert await swept.sweep() == set()


async def test_nothing_is_swept_while_redis_is_away(swept, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    everything = await swept.put("a", 1)
    swept.age(2 * KEEP_S)
    server = start_redis(tmp_path / "redis", port=free_port())
    away = State(RedisSection(url=server.url), "gateway")
    server.stop()
    lonely = Swept(swept.root, away)
    with pytest.raises(StateStoreDown):
        await lonely.sweep()
    assert {f"artifacts/{path.name}" for path in (swept.root / "artifacts").iterdir()} == everything
    await away.close()


async def test_a_bucket_is_swept_too(state, tmp_path, monkeypatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    claim = await submitted(state, "a")
    with s3_server(tmp_path) as server:
        section = StoreSection(path=server.path, endpoint_url=server.url, sweep_age_s=0.0)
        store = open_store(section)
        sweep = Sweep(state, store, section, 0.0, CollectorRegistry())
        for name in (artifact_name("a", claim.fence), artifact_name("a", 99), "b.1"):
            await store.put(name, b"data", gateway_pb2.Artifact(), LATER)
        await store.put_latents("b", [b"data"], LATER)
        # S3 tells times in whole seconds.
        time.sleep(1.1)
        for kind in KINDS:
            await sweep.once(kind)
        assert server.names() == [f"artifacts/a.{claim.fence}", f"artifacts/a.{claim.fence}.json"]


@pytest.mark.parametrize("wrong", [{"sweep_s": 0.0}, {"sweep_age_s": -1.0}])
def test_times_that_make_no_sense_stop_the_start(swept, state, wrong) -> None:
    with pytest.raises(StartupError, match="sweep"):
        Sweep(state, swept.store, StoreSection(**wrong), KEEP_S, CollectorRegistry())
