"""Request state in Redis: the queue, leases, fences and events, each change one Lua script.

Redis TIME is the only clock, all keys share one hash tag, and an owner's changes count only under the fence it got with
its claim. Other gateways hear of a change by a published message; this one's own followers and dispatcher are told at
once, without that way round. Used by the service and the dispatcher; knows nothing of gRPC or stages' work.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from gateway.followers import Followers, StoredEvent
from services.errors import StateStoreDown, UnknownRequest

log = logging.getLogger(__name__)

PREFIX = "{ll}"
IDS, LEASES, FENCE, WAKE = f"{PREFIX}:ids", f"{PREFIX}:leases", f"{PREFIX}:fence", f"{PREFIX}:wake"
PACES = f"{PREFIX}:paces"
TERMINAL = frozenset({"done", "failed", "cancelled", "expired"})
SCRIPTS = ("submit", "claim", "beat", "checkpoint", "commit", "requeue", "abort", "expired", "follow", "backlog")
READ_EVENTS = 256
# Requests of a queue that are looked at to know how much work waits in it.
SAMPLE = 200
WATCH_TIMEOUT_S = 2.0
# How long a call waits for a Redis that is away. Who asks is told soon; what a stage has made is worth a longer wait.
PATIENCE_S = 2.0
RESULT_PATIENCE_S = 30.0
RETRY_S = 0.1
TOO_LATE = -2

Fields = Mapping[str, str | bytes | float]


@dataclass(frozen=True, slots=True)
class Claim:
    """A request that this gateway owns, as long as nobody has a higher fence.

    `queue` is where it waited, `left` how many more wait in the queues that were asked.
    """

    request_id: str
    fence: int
    record: dict[str, bytes]
    queue: str
    left: int


@dataclass(frozen=True, slots=True)
class Queued:
    """What waits in a queue: requests, their pixels, and pixels times steps."""

    requests: int
    pixels: float
    pixel_steps: float

    def units(self, stage: str) -> float:
        """The work that it is for a stage, as `gateway/pace.py` counts it."""
        return {"dit": self.pixel_steps, "vae": self.pixels}.get(stage, float(self.requests))


class State:
    """The scripts as methods. Every method raises StateStoreDown when Redis does not answer, or only with an error."""

    def __init__(self, url: str, owner: str) -> None:
        # Two gateways may have been given one name; what they publish must still be told apart.
        self._owner = f"{owner}/{secrets.token_hex(4)}"
        # Tries are counted in time, by `_call`.
        self._redis: Redis = Redis.from_url(url, socket_connect_timeout=2.0, retry=Retry(NoBackoff(), 0))
        self._listener: Redis = Redis.from_url(url, socket_connect_timeout=2.0)
        folder = Path(__file__).parent / "lua"
        common = (folder / "common.lua").read_text()
        self._scripts = {
            name: self._redis.register_script(common + (folder / f"{name}.lua").read_text()) for name in SCRIPTS
        }
        self._followers = Followers()
        self._on_queue: Callable[[], None] = lambda: None
        self._on_cancel: Callable[[str], None] = lambda _request_id: None
        # What to add to our monotonic clock for the time of Redis; None before its first answer.
        self._clock_ahead_s: float | None = None
        self.connected = False

    async def submit(
        self,
        request_id: str,
        queue: str,
        *,
        priority: int,
        max_queued: int,
        keep_s: float,
        fields: Fields,
        lease_s: float | None = None,
    ) -> tuple[int, Claim | None]:
        """1 when stored, 0 when the id exists, -1 when the queue is full.

        Args:
            lease_s: claims the request at once if nobody waits before it.
        """
        keys = [_request(request_id), queue, IDS, _events(request_id)]
        lease = "" if lease_s is None else lease_s
        before = (request_id, self._owner, priority, max_queued, int(keep_s), lease, secrets.token_hex(8))
        end_s, stored = time.monotonic() + PATIENCE_S, TOO_LATE
        while stored == TOO_LATE:
            # Late while we still wait: this Redis has another clock than the one we knew. Now we know it.
            if time.monotonic() > end_s:
                raise StateStoreDown("the state store answered too late: try again", retry_after_s=1.0)
            # A Redis that stood still finds the call in its buffers when the caller has been told that it failed.
            not_after = "" if self._clock_ahead_s is None else end_s + self._clock_ahead_s
            now, stored, *claimed = await self._run("submit", keys, *before, not_after, *_flat(fields))
            self._clock_ahead_s = float(now) - time.monotonic()
        if claimed:
            return int(stored), Claim(request_id, int(claimed[0]), _record(claimed[1]), queue, 0)
        if stored == 1:
            self._on_queue()
        return int(stored), None

    async def claim(self, queues: Sequence[str], lease_s: float) -> Claim | None:
        """The first request of the first queue that has one, now ours."""
        result = await self._run("claim", [LEASES, FENCE, *queues], self._owner, lease_s)
        if not result:
            return None
        number, request_id, fence, left, flat = result
        claim = Claim(request_id.decode(), int(fence), _record(flat), queues[int(number)], int(left))
        self._followers.wake(claim.request_id)
        return claim

    async def beat(
        self, claim: Claim, lease_s: float, *, kind: str = "", payload: bytes = b"", step: int = 0, total: int = 0
    ) -> str:
        """Renews the lease, with an event if one is given. Returns the state, or "lost"."""
        event = (kind, payload, step, total) if kind else ()
        return await self._change("beat", claim, (lease_s,), event)

    async def checkpoint(self, claim: Claim, lease_s: float, step: int, checkpoints: str) -> str:
        """Notes what a request can go on from ("" for nothing). Returns the state, or "lost"."""
        arguments = (claim.request_id, claim.fence, lease_s, step, checkpoints)
        return str((await self._run("checkpoint", [_request(claim.request_id), LEASES], *arguments)).decode())

    async def commit(self, claim: Claim, state: str, stage: str, queue: str, fields: Fields) -> str:
        """Ends a stage. Returns the state afterwards ("cancelled" when an abort came first), or "lost"."""
        patience_s = RESULT_PATIENCE_S if state in ("running", "queued", "done") else PATIENCE_S
        arguments = (state, stage, queue, *_flat(fields))
        committed = await self._change("commit", claim, (), arguments, patience_s=patience_s)
        if committed == "queued":
            self._on_queue()
        return committed

    async def requeue(self, request_id: str, fence: int | None, max_attempts: int, counts: bool, error: bytes) -> str:
        """Back to the queue, or failed after `max_attempts`. Without a fence: the lease has expired."""
        keys = [_request(request_id), LEASES, FENCE]
        fenced = "" if fence is None else str(fence)
        arguments = (request_id, fenced, self._owner, max_attempts, int(counts), error)
        state = str((await self._run("requeue", keys, *arguments)).decode())
        self._followers.wake(request_id)
        if state == "queued":
            self._on_queue()
        return state

    async def abort(self, request_id: str) -> str | None:
        """The state after the abort; None for an unknown request."""
        return await self._abort(request_id, never=False)

    async def withdraw(self, request_id: str) -> None:
        """Aborts what a submit without an answer may have stored, or may still store."""
        await self._abort(request_id, never=True)

    async def _abort(self, request_id: str, *, never: bool) -> str | None:
        arguments = (request_id, self._owner, int(never))
        result = await self._run("abort", [_request(request_id)], *arguments)
        if not result:
            return None
        state = str(result.decode())
        self._followers.wake(request_id)
        if state == "cancelling":
            self._on_cancel(request_id)
        return state

    async def expired(self) -> list[str]:
        """Requests whose owner has been silent for longer than its lease."""
        return [request_id.decode() for request_id in await self._run("expired", [LEASES])]

    async def backlog(
        self, queues: Sequence[str], paces: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, Queued]]:
        """Notes the paces that this gateway has learnt; returns those of all gateways, and what waits in each queue."""
        noted, found = await self._run("backlog", [PACES, *queues], SAMPLE, *_flat(paces))
        waiting = {
            queue: Queued(int(requests), float(pixels), float(work))
            for queue, (requests, pixels, work) in zip(queues, found, strict=True)
        }
        return {name: float(pace) for name, pace in _record(noted).items()}, waiting

    async def get(self, request_id: str) -> dict[str, bytes]:
        """The stored record; empty for an unknown request."""
        record = await self._call(lambda: cast(Awaitable[Any], self._redis.hgetall(_request(request_id))))
        return {key.decode(): value for key, value in record.items()}

    async def newest(self, limit: int) -> list[str]:
        """Ids, newest first."""
        ids = await self._call(lambda: cast(Awaitable[Any], self._redis.zrevrange(IDS, 0, limit - 1)))
        return [request_id.decode() for request_id in ids]

    async def ping(self) -> bool:
        """Whether Redis answers."""
        try:
            await self._call(lambda: cast(Awaitable[Any], self._redis.ping()))
        except StateStoreDown:
            return False
        return True

    async def events(self, request_id: str, after: str) -> AsyncIterator[StoredEvent]:
        """Events later than `after` ("0" for all), until a terminal status. Once begun, it waits for Redis.

        Raises:
            UnknownRequest: there is no such request, or it has been forgotten.
            StateStoreDown: at the start only.
        """
        begun = False
        with self._followers.joined(request_id, after) as follower:
            while True:
                if follower.behind:
                    follower.behind = False
                    try:
                        events = await self._read_events(request_id, follower.seen)
                        follower.give(events)
                        follower.behind = follower.behind or len(events) == READ_EVENTS
                    except StateStoreDown:
                        if not begun:
                            raise
                        follower.behind = True
                        continue
                begun = True
                for event in follower.take():
                    yield event
                    if event.kind == "status" and event.state in TERMINAL:
                        return
                if not follower.behind:
                    await follower.wait(WATCH_TIMEOUT_S)

    async def _read_events(self, request_id: str, after: str) -> list[StoredEvent]:
        found = await self._run("follow", [_request(request_id)], request_id, after, READ_EVENTS)
        if not found:
            raise UnknownRequest(f"there is no request {request_id!r}", param="request_id")
        return _stored_events(*found)

    async def listen(self, on_queue: Callable[[], None], on_cancel: Callable[[str], None]) -> None:
        """Hands on what all gateways' scripts change, for ever: work in a queue, an abort, an event to read."""
        self._on_queue, self._on_cancel = on_queue, on_cancel
        while True:
            try:
                async with self._listener.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(WAKE)
                    self.connected = True
                    on_queue()
                    async for message in channel.listen():
                        self._hear(message["data"].decode())
            except (RedisError, OSError) as error:
                self.connected = False
                log.warning("Redis does not answer: %s", error)
                await asyncio.sleep(0.5)

    def _hear(self, message: str) -> None:
        kind, _, rest = message.partition(":")
        sender, _, request_id = rest.rpartition(":")
        if sender == self._owner:
            return
        if kind == "q":
            self._on_queue()
        elif kind == "c":
            self._on_cancel(request_id)
        else:
            self._followers.wake(request_id)

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.aclose()
        await self._listener.aclose()

    async def _change(
        self, name: str, claim: Claim, before: tuple[Any, ...], after: tuple[Any, ...], **options: float
    ) -> str:
        """A script under a fence; what it tells goes to the followers without another reading. Returns the state."""
        seen = self._followers.seen_by_all(claim.request_id)
        arguments = (claim.request_id, claim.fence, self._owner, *before, seen, READ_EVENTS, *after)
        keys = [_request(claim.request_id), LEASES]
        state, entries, flat = await self._run(name, keys, *arguments, **options)
        self._followers.give(claim.request_id, seen, _stored_events(entries, flat))
        if len(entries) == READ_EVENTS:
            self._followers.wake(claim.request_id)
        return str(state.decode())

    async def _run(self, name: str, keys: list[str], *arguments: Any, patience_s: float = PATIENCE_S) -> Any:
        return await self._call(lambda: self._scripts[name](keys=keys, args=list(arguments)), patience_s)

    async def _call(self, command: Callable[[], Awaitable[Any]], patience_s: float = PATIENCE_S) -> Any:
        # A script may have run although its answer was lost. Each may run again: a second claim takes another request,
        # and the first one's lease runs out.
        refusal: RedisError | None = None
        try:
            async with asyncio.timeout(patience_s):
                while True:
                    try:
                        return await command()
                    except (RedisConnectionError, RedisTimeoutError, OSError):
                        pass
                    except ReadOnlyError as error:
                        # After a failover the connections still lead to the old primary.
                        refusal = error
                        await self._redis.connection_pool.disconnect(inuse_connections=False)
                    except RedisError as error:
                        # Full, or unable to save: an answer, but as passing as none.
                        refusal = error
                    await asyncio.sleep(RETRY_S)
        except TimeoutError as error:
            if refusal is not None:
                log.error("Redis refuses commands: %s", refusal)
            what = "does not answer" if refusal is None else "refuses commands"
            raise StateStoreDown(f"the state store {what}: try again later", retry_after_s=1.0) from error


def queue_key(stage: str, component_id: str) -> str:
    """The queue of a stage's component."""
    return f"{PREFIX}:q:{stage}:{component_id}"


def _request(request_id: str) -> str:
    return f"{PREFIX}:req:{request_id}"


def _events(request_id: str) -> str:
    return f"{PREFIX}:ev:{request_id}"


def _stored_events(entries: Sequence[tuple[bytes, Sequence[bytes]]], flat: Sequence[bytes]) -> list[StoredEvent]:
    record = _record(flat)
    events = []
    for entry_id, parts in entries:
        fields = dict(zip(parts[::2], parts[1::2], strict=True))
        kind = fields[b"k"].decode()
        events.append(
            StoredEvent(
                event_id=entry_id.decode(),
                kind=kind,
                state=fields.get(b"s", b"").decode(),
                payload=fields.get(b"p", b""),
                record=record if kind == "status" else {},
            )
        )
    return events


def _record(flat: Sequence[bytes]) -> dict[str, bytes]:
    return {key.decode(): value for key, value in zip(flat[::2], flat[1::2], strict=True)}


def _flat(fields: Fields) -> list[Any]:
    return [part for pair in fields.items() for part in pair]
