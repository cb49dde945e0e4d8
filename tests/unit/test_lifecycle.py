"""What owners of a request leave in the artifact store, on a real Redis."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway import http_videos
from gateway.access import CallerRequests
from gateway.config import GatewaySection, RedisSection, StagesSection
from gateway.dispatch import Dispatcher
from gateway.lifecycle import Lifecycle
from gateway.links import Links
from gateway.objects import Folder
from gateway.records import IDS, ids_key, queue_key, request_key
from gateway.replica import Place, Replica
from gateway.replicas import Replicas
from gateway.requests import RequestService
from gateway.state import State
from gateway.store import Store
from gateway.ticket import Ticket
from gateway.work import Work
from protos import gateway_pb2, types_pb2
from services.errors import ArtifactStoreFull, DeviceLost, UnknownRequest

LATER = float("inf")
QUEUE = queue_key("dit", "d")
REPLICAS = Replicas(StagesSection(), lambda: None)


class Decoded:
    """A Decode call that has ended."""

    def __init__(self, data: bytes) -> None:
        self.artifact = gateway_pb2.Artifact(mime="image/png")
        self.digests = None
        self.start_unix_ns = time.time_ns()
        self._data = data

    async def media(self) -> bytes:
        return self._data

    async def ended(self) -> dict[str, types_pb2.StageUsage]:
        return {"vae": types_pb2.StageUsage()}

    async def close(self) -> None:
        """Nothing to end."""


class Gateway:
    """One that owns requests and finishes them."""

    def __init__(self, url: str, folder: Path) -> None:
        self.folder = folder
        self.state = State(RedisSection(url=url), "gateway")
        self.store = Store(Folder(folder))
        self.lifecycle = Lifecycle(self.state, REPLICAS, self.store, GatewaySection(), "gateway")
        links = Links(self.state.shared_key, "", 60.0)
        dispatcher = cast(Dispatcher, None)
        self.service = RequestService(self.state, dispatcher, REPLICAS, self.store, links, GatewaySection(), {})

    async def submit(self, request_id: str) -> None:
        params = types_pb2.GenerationParams(width=64, height=64, num_frames=1).SerializeToString()
        await self.state.submit(request_id, QUEUE, Ticket(), {"params": params, "traceparent": ""})

    async def claim(self, lease_s: float) -> Work:
        claim = await self.state.claim((QUEUE,), lease_s)
        assert claim is not None
        return Work.of(claim)

    async def finish(self, work: Work, data: bytes) -> None:
        await self.lifecycle._finish(work, cast(Any, Decoded(data)))

    def files(self) -> set[str]:
        return {path.name for kind in ("artifacts", "latents") for path in (self.folder / kind).iterdir()}


async def joined(pieces: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in pieces])


@pytest.fixture
async def two(url: str, tmp_path: Path) -> AsyncIterator[tuple[Gateway, Gateway]]:
    gateways = Gateway(url, tmp_path), Gateway(url, tmp_path)
    await gateways[0].state._scripts.redis.flushall()
    yield gateways
    for gateway in gateways:
        await gateway.state.close()


async def test_a_request_that_nobody_has_aborted_is_not_cancelled_by_an_owner_that_lets_go(two) -> None:
    """As when a server that knows less, during a failover, says that the lease is lost."""
    own, other = two
    await own.submit("r")
    work = await own.claim(lease_s=10.0)
    await own.lifecycle._cancelled(work, counts=False)
    record = await own.state.get("r")
    assert (record["state"], record["attempt"], record.get("error")) == (b"queued", b"0", None)
    again = await other.claim(lease_s=10.0)
    await other.state.abort("r")
    await other.lifecycle._cancelled(again, counts=False)
    record = await own.state.get("r")
    assert (record["state"], own.files()) == (b"cancelled", set())


async def test_an_abort_that_a_failover_has_lost_holds_where_it_was_heard(two) -> None:
    own, _ = two
    await own.submit("r")
    work = await own.claim(lease_s=10.0)
    own.lifecycle.aborted.add("r")
    await own.lifecycle._cancelled(work, counts=False)
    assert (await own.state.get("r"))["state"] == b"cancelled"


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
        await own.store.put_latents("r", [b"stale"], LATER)
        await own.finish(stale, b"stale")
    assert own.files() == {owner.artifact_name, f"{owner.artifact_name}.json"}
    for gateway in two:
        content = await gateway.service.content("r")
        assert content.artifact.nbytes == 4 and await joined(content.read(0, 4)) == b"good"
        assert await joined(gateway.service.media(await gateway.service.get("r"))) == b"good"


async def test_what_a_dead_owner_wrote_goes_when_its_request_is_taken_away(two) -> None:
    own, other = two
    await own.submit("r")
    dead = await own.claim(lease_s=0.0)
    await own.store.put(dead.artifact_name, b"dead", gateway_pb2.Artifact(), LATER)
    assert len(own.files()) == 2
    await other.lifecycle.take_away("r", b"e")
    assert own.files() == set()


async def test_taking_a_request_away_lists_no_artifacts(two, monkeypatch) -> None:
    own, other = two
    listed: list[str] = []
    once = other.store._objects.listed

    def noted(prefix: str) -> Any:
        listed.append(prefix)
        return once(prefix)

    monkeypatch.setattr(other.store._objects, "listed", noted)
    await own.submit("r")
    dead = await own.claim(lease_s=0.0)
    await own.store.put(dead.artifact_name, b"dead", gateway_pb2.Artifact(), LATER)
    await other.lifecycle.take_away("r", b"e")
    assert own.files() == set()
    assert not [prefix for prefix in listed if prefix.startswith("artifacts")]


async def test_what_it_wrote_goes_too_when_the_answer_to_taking_it_away_was_lost(two, monkeypatch) -> None:
    own, other = two
    await own.submit("r")
    dead = await own.claim(lease_s=0.0)
    await own.store.put(dead.artifact_name, b"dead", gateway_pb2.Artifact(), LATER)
    once = other.state.requeue

    async def twice(*arguments: Any) -> str:
        await once(*arguments)
        return await once(*arguments)

    monkeypatch.setattr(other.state, "requeue", twice)
    await other.lifecycle.take_away("r", b"e")
    assert own.files() == set()


@pytest.mark.parametrize("cancels", [1, 3])
async def test_a_cancelled_request_leaves_no_file_however_often_its_owner_hears_of_it(
    two, monkeypatch, cancels: int
) -> None:
    """By the abort, by a second one, and by the beat that finds the lease lost, while the file is being written."""
    own, _ = two
    own.lifecycle._replicas._last[Place("vae", "")] = types_pb2.DescribeResponse(component_id="v", models=[""])
    writing, goes_on = threading.Event(), threading.Event()

    def slow_sync(_file: int) -> None:
        writing.set()
        goes_on.wait(10)

    monkeypatch.setattr("gateway.objects.os.fdatasync", slow_sync)
    monkeypatch.setattr("gateway.lifecycle.Decode", lambda *_: Decoded(b"late"))
    await own.submit("r")
    work = await own.claim(lease_s=10.0)
    await own.store.put_latents("r", [b"latents"], LATER)
    await own.state.commit(work.claim, "running", "vae", "", {})
    claim = replace(work.claim, record=await own.state.get("r"))
    running = asyncio.create_task(own.lifecycle.run(claim, Replica("vae", "nowhere:1", cast(Any, None))))
    await asyncio.to_thread(writing.wait, 10)
    await own.state.abort("r")
    for _ in range(cancels):
        running.cancel()
        await asyncio.sleep(0.2)
    goes_on.set()
    await asyncio.wait({running})
    assert (await own.state.get("r"))["state"] == b"cancelled"
    assert own.files() == set()


async def test_a_decode_that_fails_waits_for_no_full_store(two, monkeypatch) -> None:
    own, _ = two

    def full(*_arguments: Any, **_options: Any) -> None:
        raise ArtifactStoreFull("no room")

    class Broken(Decoded):
        async def ended(self) -> dict[str, types_pb2.StageUsage]:
            await asyncio.sleep(0.2)
            raise DeviceLost("it broke")

    monkeypatch.setattr(own.store._objects, "write", full)
    await own.submit("r")
    work = await own.claim(lease_s=10.0)
    async with asyncio.timeout(5):
        with pytest.raises(DeviceLost):
            await own.lifecycle._finish(work, cast(Any, Broken(b"picture")))


async def test_a_result_whose_commit_was_not_answered_is_kept(two) -> None:
    own, _ = two
    await own.submit("r")
    work = await own.claim(lease_s=10.0)
    await own.finish(work, b"good")
    # As when a beat meanwhile says that the request is not ours any more.
    await own.lifecycle._cancelled(work, counts=False)
    assert own.files() == {work.artifact_name, f"{work.artifact_name}.json"}


async def test_a_request_whose_latents_are_lost_is_denoised_again(two) -> None:
    own, _ = two
    vae = queue_key("vae", "v")
    own.lifecycle._replicas._last[Place("dit", "")] = types_pb2.DescribeResponse(component_id="d", models=[""])
    own.lifecycle._replicas._last[Place("vae", "")] = types_pb2.DescribeResponse(component_id="v", models=[""])
    await own.submit("r")
    for times in range(3):
        work = await own.claim(lease_s=10.0)
        await own.state.commit(work.claim, "queued", "vae", vae, {"queue": vae})
        claim = await own.state.claim((vae,), 10.0)
        assert claim is not None
        replica = Replica("vae", "nowhere:1", cast(Any, None))
        await own.lifecycle.run(claim, replica)
        record = await own.state.get("r")
        if times < 2:
            assert (record["state"], record["stage"], record["queue"]) == (b"queued", b"dit", QUEUE.encode())
    # A store that loses them each time: it goes on as any failure does.
    assert (record["state"], record["stage"]) == (b"queued", b"vae")


async def test_a_request_without_an_encoder_is_given_back_and_its_denoiser_is_not_blamed(two) -> None:
    own, _ = two
    await own.submit("r")
    claim = await own.state.claim((QUEUE,), 10.0)
    assert claim is not None
    replica = Replica("dit", "nowhere:1", cast(Any, None))
    await own.lifecycle.run(claim, replica)
    record = await own.state.get("r")
    assert (record["state"], record["attempt"]) == (b"queued", b"0")
    assert replica.paused_until_s == 0.0


async def test_a_list_is_the_newest_that_one_message_takes_read_in_few_calls(two, monkeypatch) -> None:
    own, _ = two
    for number in range(250):
        params = types_pb2.GenerationParams(prompt=f"{number} " + "x" * 40_000)
        await own.state.submit(f"r{number}", QUEUE, Ticket(), {"params": params.SerializeToString()})
    calls, call = [], own.state._scripts.call

    async def counted(*arguments):
        calls.append(arguments)
        return await call(*arguments)

    monkeypatch.setattr(own.state._scripts, "call", counted)
    assert [one.request_id for one in await own.service.newest(120)] == [f"r{249 - n}" for n in range(120)]
    assert len(calls) == 3
    found = await own.service.newest(1000)
    assert [one.request_id for one in found] == [f"r{249 - n}" for n in range(len(found))]
    assert 7_900_000 < sum(one.ByteSize() for one in found) <= 8 * 1024 * 1024


async def test_a_walk_goes_through_all_requests_and_reads_what_is_taken(two, monkeypatch) -> None:
    own, _ = two
    for number in range(250):
        await own.state.submit(f"r{number}", QUEUE, Ticket(), {"params": b""})
    oldest = [f"r{number}" for number in range(250)]

    async def walked(**options) -> list[str]:
        return [request_id async for request_id, _ in own.service.walk(None, **options)]

    assert await walked(after="", oldest_first=False) == oldest[::-1]
    assert await walked(after="", oldest_first=True) == oldest
    assert await walked(after="r30", oldest_first=False) == oldest[29::-1]
    assert await walked(after="r120", oldest_first=True) == oldest[121:]
    for oldest_first in (False, True):
        with pytest.raises(UnknownRequest, match="nobody"):
            await walked(after="nobody", oldest_first=oldest_first)
    read, records = [], own.state.records

    async def noted(ids):
        read.extend(ids)
        return await records(ids)

    monkeypatch.setattr(own.state, "records", noted)
    async for request_id, _ in own.service.walk(None, after="", oldest_first=False):
        if request_id == "r248":
            # What comes meanwhile neither hides a request nor shows one twice.
            await own.state.submit("new", QUEUE, Ticket(), {"params": b""})
        if request_id == "r160":
            break
    assert read == oldest[:149:-1]
    assert await own.state.following("r150", 100, None, oldest_first=False) == oldest[149:49:-1]


@pytest.mark.parametrize("oldest_first", [False, True])
async def test_a_walk_goes_on_where_ids_are_forgotten_meanwhile(two, oldest_first) -> None:
    own, _ = two
    for number in range(250):
        await own.state.submit(f"r{number}", QUEUE, Ticket(), {"params": b""})
    walked: list[str] = []
    async for request_id, _ in own.service.walk(None, after="", oldest_first=oldest_first):
        walked.append(request_id)
        if len(walked) == 100:
            # The oldest ones, up to the last that was read, or from the next one on.
            await own.state._scripts.redis.zremrangebyrank(IDS, 0, 99 if oldest_first else 150)
    oldest = [f"r{number}" for number in range(250)]
    assert walked == (oldest if oldest_first else oldest[:149:-1])


async def test_a_page_of_clips_reads_no_more_than_its_part_of_the_list(two, monkeypatch) -> None:
    own, _ = two
    clip = types_pb2.GenerationParams(num_frames=9, fps=16.0).SerializeToString()
    for number in range(450):
        params = clip if number in (5, 6, 290, 440) else b""
        await own.state.submit(f"r{number}", QUEUE, Ticket(tenant="t"), {"params": params})
    await own.state.submit("other", QUEUE, Ticket(tenant="o"), {"params": clip})
    requests = cast(CallerRequests, SimpleNamespace(walk=partial(own.service.walk, "t")))
    monkeypatch.setattr(http_videos, "MAX_READ", 200)

    async def page(after: str, limit: int = 20) -> tuple[list[str], bool, str | None]:
        data, more, last_id = await http_videos._page(requests, limit, after, oldest_first=False)
        return [one["id"] for one in data], more, last_id

    assert await page("") == (["r440", "r290"], True, "r250")
    assert await page("r250") == ([], True, "r50")
    assert await page("r50") == (["r6", "r5"], False, "r5")
    assert await page("r50", limit=1) == (["r6"], True, "r6")
    # Its record may be gone while its id is known, but not both.
    await own.state._scripts.redis.delete(request_key("r250"))
    assert await page("r250") == ([], True, "r50")
    await own.state._scripts.redis.zrem(ids_key("t"), "r250")
    for unknown in ("r250", "other", "nothing"):
        with pytest.raises(UnknownRequest, match=f"after: there is no request '{unknown}'") as refused:
            await page(unknown)
        assert refused.value.param == "after"


async def test_the_deadline_is_what_was_left_by_the_clock_of_redis(two) -> None:
    own, _ = two
    await own.submit("r")
    record = await own.state.get("r")
    assert float(record["deadline"]) - float(record["created"]) == pytest.approx(Ticket().timeout_s, abs=1e-3)
    before_s = time.monotonic()
    work = await own.claim(lease_s=10.0)
    waited_s = float(work.claim.record["queued_s"])
    assert before_s <= work.deadline_s - Ticket().timeout_s + waited_s + 1e-3 <= time.monotonic() + 2e-3
