"""What is left when a run has ended: requests and events in Redis, files of the store, leases, slots, processes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import redis
from prometheus_client import CollectorRegistry

from gateway.config import GatewaySection, RedisSection, StoreSection
from gateway.objects import KINDS
from gateway.records import LEASES, PREFIX
from gateway.state import State
from gateway.store import open_store
from gateway.sweep import Sweep
from protos import gateway_pb2
from tests.faults.checker import CLEAN_UP_S
from tests.faults.cluster import FaultCluster
from tests.faults.history import Line

POLL_S = 0.1


async def settled(cluster: FaultCluster, timeout_s: float) -> float:
    """Waits until requests hold nothing any more, for `timeout_s` at most; returns the seconds that it took."""
    started_s = time.monotonic()
    while time.monotonic() - started_s < timeout_s:
        if not await asyncio.to_thread(leftovers, cluster):
            break
        await asyncio.sleep(POLL_S)
    return time.monotonic() - started_s


async def sweep(cluster: FaultCluster) -> list[str]:
    """Sweeps the store as a gateway does, whatever the age of a file. Returns the files that went.

    A request holds nothing any more from its end on, and its gateway clears up behind that.
    """
    end_s = time.monotonic() + CLEAN_UP_S
    while _files(cluster.store / "latents") and time.monotonic() < end_s:
        await asyncio.sleep(POLL_S)
    section = StoreSection(path=str(cluster.store), sweep_age_s=0.0)
    state = State(RedisSection(url=cluster.redis_url), "sweep")
    before = _files(cluster.store)
    try:
        sweep = Sweep(state, open_store(section), section, GatewaySection().keep_s, CollectorRegistry())
        for kind in KINDS:
            await sweep.once(kind)
    finally:
        await state.close()
    return sorted(before - _files(cluster.store))


def _files(store: Path) -> set[str]:
    return {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()}


def leftovers(cluster: FaultCluster) -> list[str]:
    """Leases, queue entries, slots, jobs, files under way and orphaned processes. Empty when all is well."""
    with redis.Redis.from_url(cluster.redis_url) as store:
        leases = [f"lease of {member.decode()}" for member in store.zrange(LEASES, 0, -1)]
        queues = store.scan_iter(f"{PREFIX}:q:*")
        waiting = [f"{key.decode()}: {member.decode()}" for key in queues for member in _members(store, key)]
    return leases + waiting + cluster.held() + cluster.orphans()


def _members(store: redis.Redis, key: bytes) -> list[bytes]:
    return list(store.zrange(key, 0, -1)) if store.type(key) == b"zset" else []


def collect(url: str, store: Path, ids: Iterable[str], left: list[str], swept: Iterable[str] = ()) -> Line:
    """The final state of these requests, what `leftovers` found, and the files of these requests that were swept."""
    with redis.Redis.from_url(url) as client:
        requests = {request_id: _request(client, request_id) for request_id in ids}
    artifacts = {}
    for path in (store / "artifacts").iterdir():
        if path.suffix != ".json" and path.name.partition(".")[0] in requests:
            artifacts[path.name] = _artifact(path)
    theirs = [name for name in swept if _owner_of(name) in requests]
    return {"requests": requests, "artifacts": artifacts, "left": left, "swept": theirs}


def _owner_of(name: str) -> str:
    """Whose request a file of the store belongs to, an unfinished one too."""
    return Path(name).name.removeprefix(".").partition(".")[0]


def _request(client: redis.Redis, request_id: str) -> dict[str, Any]:
    record = {key.decode(): value for key, value in client.hgetall(f"{PREFIX}:req:{request_id}").items()}
    artifact = gateway_pb2.Artifact.FromString(record.get("artifact", b""))
    events = []
    for event_id, fields in client.xrange(f"{PREFIX}:ev:{request_id}"):
        kind, state = fields[b"k"].decode(), fields.get(b"s", b"").decode()
        events.append({"id": event_id.decode(), "t": int(event_id.split(b"-")[0]) / 1000, "kind": kind, "state": state})
    return {
        "state": record.get("state", b"").decode(),
        "fence": int(record.get("fence", 0)),
        "attempt": int(record.get("attempt", 0)),
        "file": record.get("file", b"").decode(),
        "sha256": artifact.sha256,
        "error": record.get("error", b"").decode(errors="replace"),
        "events": events,
    }


def _artifact(path: Path) -> dict[str, Any]:
    manifest = path.with_name(f"{path.name}.json")
    said = json.loads(manifest.read_text()) if manifest.exists() else {}
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "manifest": said.get("sha256", "")}
