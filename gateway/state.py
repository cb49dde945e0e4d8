"""Request state in Redis: the queue, leases, fences and events, each change one Lua script.

Redis TIME is the only clock, all keys share one hash tag, and an owner's changes count only under the fence it got with
its claim. `lua/queue.lua` says how a queue is ordered. Other gateways hear of a change by a published message; this
one's own followers and dispatcher are told at once, without that way round. Used by the service and the dispatcher;
knows nothing of gRPC or stages' work.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, cast

from gateway.config import RedisSection
from gateway.followers import READ_EVENTS, Followers, StoredEvent, record_of, stored_events
from gateway.listener import Listener
from gateway.records import (
    DUE,
    FENCE,
    IDS,
    LATENTS,
    LEASES,
    LINK_KEY,
    PACES,
    PREFIX,
    PROBE,
    Claim,
    Holding,
    Queued,
    events_key,
    ids_key,
    inputs_key,
    request_key,
    slots_of,
)
from gateway.scripts import PATIENCE_S, Scripts
from gateway.ticket import Offer, Start, Ticket
from services.errors import DeadlineExceeded, Overloaded, StateStoreDown, UnknownRequest
from services.wire import error_to_proto

# Requests of a queue that are looked at to know how much work waits in it.
SAMPLE = 200
# What a stage has made is worth a longer wait for Redis than PATIENCE_S.
RESULT_PATIENCE_S = 30.0
MAX_RETRY_AFTER_S = 60.0
SWEPT_AT_ONCE = 100
PROBE_S = 60
QUEUE_FULL, TOO_LATE, TENANT_FULL, WORK_FULL = -1, -2, -3, -4
_TOO_LONG = error_to_proto(DeadlineExceeded("the request's deadline passed while it waited")).SerializeToString()

Fields = Mapping[str, str | bytes | float]


class State:
    """The scripts as methods. Every method raises StateStoreDown when Redis does not answer, or only with an error."""

    def __init__(self, redis: RedisSection, owner: str) -> None:
        # Two gateways may have been given one name; what they publish must still be told apart.
        self._owner = f"{owner}/{secrets.token_hex(4)}"
        self._scripts = Scripts(redis)
        self._followers = Followers()
        self._listener = Listener(redis, self._scripts, self._owner, self._followers)
        self._on_queue: Callable[[], None] = lambda: None
        self._on_cancel: Callable[[str], None] = lambda _request_id: None
        self._on_expired: Callable[[str], None] = lambda _request_id: None
        # What to add to our monotonic clock for the time of Redis; None before its first answer.
        self._clock_ahead_s: float | None = None

    @property
    def connected(self) -> bool:
        """Whether it hears what other gateways change."""
        return self._listener.connected

    async def submit(
        self,
        request_id: str,
        queue: str,
        ticket: Ticket,
        fields: Fields,
        *,
        inputs: bytes = b"",
        start: Start | None = None,
    ) -> tuple[bool, Claim | None]:
        """Stores a request and queues it. False when the id exists.

        Args:
            inputs: what `inputs` gives until the request has ended.
            start: claims the request at once, where that may be.

        Raises:
            Overloaded: too many wait, or too many of that tenant, or too much work or too many bytes.
        """
        keys = [request_key(request_id), queue, IDS, events_key(request_id), ids_key(ticket.tenant)]
        bounds = (ticket.max_queued, ticket.max_queued_tenant, ticket.max_queued_cost, ticket.max_queued_bytes)
        size = (ticket.priority_class, ticket.tenant, ticket.cost, ticket.nbytes)
        terms = (ticket.keep_s, ticket.timeout_s, *bounds, *size)
        lease, slots = (start.lease_s, start.mark) if start else ("", ""), slots_of(start.offer if start else Offer())
        before = (request_id, self._owner, *terms, *lease)
        kept = {name: getattr(ticket, name) for name in ("priority", "weight", "batch", "feed", "age_s")}
        stored, rest = await self._submit(keys, before, (*slots, *_flat(kept), *_flat(fields), inputs))
        if stored in (QUEUE_FULL, TENANT_FULL, WORK_FULL):
            raise _overloaded(ticket, stored, float(rest[0]))
        if stored:
            self._accepted(request_id, ticket, fields)
        if rest:
            return bool(stored), Claim(request_id, int(rest[0]), record_of(rest[1]), queue, 0)
        if stored:
            self._on_queue()
        return bool(stored), None

    async def _submit(self, keys: list[str], before: tuple[Any, ...], after: tuple[Any, ...]) -> tuple[int, list[Any]]:
        """What the script says, with the moment between its arguments at which nobody waits for it any more."""
        end_s, stored = time.monotonic() + PATIENCE_S, TOO_LATE
        while stored == TOO_LATE:
            # Late while we still wait: this Redis has another clock than the one we knew. Now we know it.
            if time.monotonic() > end_s:
                raise StateStoreDown("the state store answered too late: try again", retry_after_s=1.0)
            # A Redis that stood still finds the call in its buffers when the caller has been told that it failed.
            not_after = "" if self._clock_ahead_s is None else end_s + self._clock_ahead_s
            now, stored, *rest = await self._scripts.run("submit", keys, *before, not_after, *after)
            self._clock_ahead_s = float(now) - time.monotonic()
        return stored, rest

    async def claim(
        self, queues: Sequence[str], lease_s: float, offers: Mapping[str, Offer] | None = None
    ) -> Claim | None:
        """The request that is due in the first queue that has one, now ours; or one near it that suits better.

        Args:
            offers: by queue, who would get the request.
        """
        offered = [(offers or {}).get(queue) or Offer() for queue in queues]
        arguments = [part for offer in offered for part in (*slots_of(offer), *_wanted(offer))]
        keys = [LEASES, FENCE, *queues]
        answer = await self._scripts.run("claim", keys, self._owner, lease_s, _TOO_LONG, *arguments)
        claimed, expired, full = answer
        self._expire(expired)
        for number in full:
            offered[number].full = True
        if not claimed:
            return None
        number, request_id, fence, left, flat = claimed
        claim = Claim(request_id.decode(), int(fence), record_of(flat), queues[int(number)], int(left))
        self._followers.wake(claim.request_id)
        return claim

    async def sweep(self) -> None:
        """Ends queued requests whose deadline has passed, and moves up those that have waited long."""
        swept = SWEPT_AT_ONCE
        while swept == SWEPT_AT_ONCE:
            swept, expired = await self._scripts.run("sweep", [DUE], self._owner, _TOO_LONG, SWEPT_AT_ONCE)
            self._expire(expired)

    def _expire(self, expired: Sequence[bytes]) -> None:
        for request_id in expired:
            self._followers.wake(request_id.decode())
            self._changed(request_id.decode(), "expired")
            self._on_expired(request_id.decode())

    async def beat(
        self, claim: Claim, lease_s: float, *, kind: str = "", payload: bytes = b"", step: int = 0, total: int = 0
    ) -> str:
        """Renews the lease, with an event if one is given. Returns the state, or "lost"."""
        event = (kind, payload, step, total) if kind else ()
        return await self._change("beat", claim, (lease_s,), event)

    async def checkpoint(self, claim: Claim, lease_s: float, step: int, checkpoints: str) -> str:
        """Notes what a request can go on from ("" for nothing). Returns the state, or "lost"."""
        arguments = (claim.request_id, claim.fence, lease_s, step, checkpoints)
        return str(
            (await self._scripts.run("checkpoint", [request_key(claim.request_id), LEASES], *arguments)).decode()
        )

    async def commit(self, claim: Claim, state: str, stage: str, queue: str, fields: Fields) -> str:
        """Ends a stage. Returns the state afterwards ("cancelled" when an abort came first), or "lost"."""
        patience_s = RESULT_PATIENCE_S if state in ("running", "queued", "done") else PATIENCE_S
        arguments = (state, stage, queue, *_flat(fields))
        committed = await self._change("commit", claim, (), arguments, patience_s=patience_s)
        if committed in ("queued", "running"):
            # It waits, or it has left a slot for another one.
            self._on_queue()
        self._changed(claim.request_id, committed)
        return committed

    async def requeue(self, request_id: str, fence: int | None, max_attempts: int, counts: bool, error: bytes) -> str:
        """Back to the queue, or failed after `max_attempts`. Without a fence: the lease has expired."""
        keys = [request_key(request_id), LEASES, FENCE]
        fenced = "" if fence is None else str(fence)
        arguments = (request_id, fenced, self._owner, max_attempts, int(counts), error)
        state = str((await self._scripts.run("requeue", keys, *arguments)).decode())
        self._followers.wake(request_id)
        if state == "queued":
            self._on_queue()
        self._changed(request_id, state)
        return state

    async def give_back(self, request_id: str, mark: str, max_attempts: int) -> None:
        """Back to the queue with what a submit with that Start's mark has claimed, if it has; it is no attempt."""

        async def ask() -> list[bytes | None]:
            names = ["try", "fence"]
            return await cast(Awaitable[list[bytes | None]], self._scripts.redis.hmget(request_key(request_id), names))

        found, fence = await self._scripts.call(ask)
        # Only a claim leaves its mark, and it goes with the claim.
        if found == mark.encode():
            await self.requeue(request_id, int(fence), max_attempts, False, b"")

    async def abort(self, request_id: str, tenant: str = "") -> str | None:
        """The state after the abort; None for an unknown request, or one that is not this tenant's ("" for any)."""
        state = await self._abort(request_id, tenant, never=False)
        if state is not None:
            self._changed(request_id, state)
        return state

    async def withdraw(self, request_id: str) -> None:
        """Aborts what a submit without an answer may have stored, or may still store."""
        await self._abort(request_id, "", never=True)

    async def _abort(self, request_id: str, tenant: str, *, never: bool) -> str | None:
        arguments = (request_id, self._owner, int(never), tenant)
        result = await self._scripts.run("abort", [request_key(request_id)], *arguments, ahead=True)
        if not result:
            return None
        state = str(result.decode())
        self._followers.wake(request_id)
        if state == "cancelling":
            self._on_cancel(request_id)
        return state

    async def expired(self) -> list[str]:
        """Requests whose owner has been silent for longer than its lease."""
        return [request_id.decode() for request_id in await self._scripts.run("expired", [LEASES])]

    async def backlog(
        self, queues: Sequence[str], paces: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, Queued]]:
        """Notes the paces that this gateway has learnt; returns those of all gateways, and what waits in each queue."""
        noted, found = await self._scripts.run("backlog", [PACES, *queues], SAMPLE, *_flat(paces))
        waiting = {
            queue: Queued(int(row[0]), float(row[1]), float(row[2]), int(row[3]), float(row[4]))
            for queue, row in zip(queues, found, strict=True)
        }
        return {name: float(pace) for name, pace in record_of(noted).items()}, waiting

    async def get(self, request_id: str) -> dict[str, bytes]:
        """The stored record; empty for an unknown request."""
        record = await self._scripts.call(
            lambda: cast(Awaitable[Any], self._scripts.redis.hgetall(request_key(request_id)))
        )
        return {key.decode(): value for key, value in record.items()}

    async def records(self, request_ids: Sequence[str]) -> list[dict[str, bytes]]:
        """The stored records, in one go; empty for unknown requests."""

        async def ask() -> list[dict[bytes, bytes]]:
            async with self._scripts.redis.pipeline(transaction=False) as pipe:
                for request_id in request_ids:
                    pipe.hgetall(request_key(request_id))
                return cast(list[dict[bytes, bytes]], await pipe.execute())

        found = await self._scripts.call(ask) if request_ids else []
        return [{key.decode(): value for key, value in record.items()} for record in found]

    async def inputs(self, request_id: str) -> bytes | None:
        """What a request was submitted with; None once it has ended, or if that was nothing."""
        key = inputs_key(request_id)
        return cast(bytes | None, await self._scripts.call(lambda: cast(Awaitable[Any], self._scripts.redis.get(key))))

    async def tenant_of(self, request_id: str) -> str | None:
        """Whose request it is; None for an unknown one."""
        tenant = await self._scripts.call(
            lambda: cast(Awaitable[Any], self._scripts.redis.hget(request_key(request_id), "tenant"))
        )
        return None if tenant is None else str(tenant.decode())

    async def charge(self, key_id: str, allowances: Sequence[tuple[float, float, float]]) -> tuple[float, int]:
        """Takes (amount, limit, window in seconds) from each quota of a key, or nothing from any.

        Returns the seconds until there is enough, 0 when it was taken, and the number of the quota that lacks most.
        """
        flat = [part for allowance in allowances for part in allowance]
        wait_s, number = await self._scripts.run("charge", [f"{PREFIX}:quota:{key_id}"], *flat)
        return float(wait_s), int(number)

    async def following(self, request_id: str, count: int, tenant: str | None, *, oldest_first: bool) -> list[str]:
        """The next `count` ids after that one, newest or oldest first; "" begins the list.

        Args:
            tenant: whose; None for all.

        Raises:
            UnknownRequest: the list does not have that one, or no longer.
        """
        key, redis = IDS if tenant is None else ids_key(tenant), self._scripts.redis

        async def ask() -> list[bytes]:
            rank = -1
            if request_id:
                found = await cast(Awaitable[Any], (redis.zrank if oldest_first else redis.zrevrank)(key, request_id))
                if found is None:
                    raise UnknownRequest(f"there is no request {request_id!r}", param="request_id")
                rank = int(found)
            ids = redis.zrange(key, rank + 1, rank + count, desc=not oldest_first)
            return cast(list[bytes], await cast(Awaitable[Any], ids))

        ids = [one.decode() for one in await self._scripts.call(ask)]
        # A request that came between the two questions has moved the others on.
        return ids[ids.index(request_id) + 1 :] if request_id in ids else ids

    async def holdings(self, request_ids: Sequence[str]) -> list[Holding | None]:
        """Of each request; None for an unknown one."""

        async def ask() -> list[list[bytes | None]]:
            async with self._scripts.redis.pipeline(transaction=False) as pipe:
                for request_id in request_ids:
                    pipe.hmget(request_key(request_id), ["state", "fence", "file"])
                return cast(list[list[bytes | None]], await pipe.execute())

        rows = await self._scripts.call(ask) if request_ids else []
        return [Holding(*((part or b"").decode() for part in row)) if row[0] else None for row in rows]

    async def shared_key(self, proposal: bytes) -> bytes:
        """The key that the gateways sign links with: this one, if there was none."""

        async def ask() -> bytes:
            await self._scripts.redis.set(LINK_KEY, proposal, nx=True)
            return cast(bytes, await self._scripts.redis.get(LINK_KEY))

        return cast(bytes, await self._scripts.call(ask))

    async def latents_bytes_a_pixel(self, kind: str) -> float | None:
        """What the gateways have learnt of a kind of request; None before its first latents."""
        found = await self._scripts.call(lambda: cast(Awaitable[Any], self._scripts.redis.hget(LATENTS, kind)))
        return None if found is None else float(found)

    async def note_latents(self, kind: str, bytes_a_pixel: float) -> None:
        """The newest latents of a kind of request were as large."""
        await self._scripts.call(
            lambda: cast(Awaitable[Any], self._scripts.redis.hset(LATENTS, kind, str(bytes_a_pixel)))
        )

    async def writable(self) -> bool:
        """Whether Redis takes writes: one that is full, or a primary no more, still answers a ping."""
        try:
            await self._scripts.call(lambda: cast(Awaitable[Any], self._scripts.redis.set(PROBE, b"", ex=PROBE_S)))
        except StateStoreDown:
            return False
        return True

    async def events(self, request_id: str, after: str) -> AsyncIterator[StoredEvent]:
        """Events later than `after` ("0" for all), until a terminal status; none when that was it.

        Once begun, it waits for Redis.

        Raises:
            UnknownRequest: there is no such request, or it has been forgotten.
            StateStoreDown: at the start only.
        """
        async for event in self._followers.follow(request_id, after, self._read_events):
            yield event

    async def _read_events(self, request_id: str, after: str) -> tuple[list[StoredEvent], bool]:
        found = await self._scripts.run("follow", [request_key(request_id)], request_id, after, READ_EVENTS)
        if not found:
            raise UnknownRequest(f"there is no request {request_id!r}", param="request_id")
        entries, flat, ended = found
        return stored_events(entries, flat), bool(ended)

    async def listen(
        self,
        on_queue: Callable[[], None],
        on_cancel: Callable[[str], None],
        on_expired: Callable[[str], None],
    ) -> None:
        """Hands on what all gateways' scripts change, for ever: work in a queue, an abort, an event to read.

        Args:
            on_expired: told by the gateway that found a queued request too late.

        Raises:
            StartupError: this Redis may throw away what it is told.
        """
        self._on_queue, self._on_cancel, self._on_expired = on_queue, on_cancel, on_expired
        await self._listener.run(on_queue, on_cancel)

    async def close(self) -> None:
        """Closes the connections."""
        await self._scripts.close()
        await self._listener.close()

    def _accepted(self, request_id: str, ticket: Ticket, fields: Fields) -> None:
        """A request has been stored: for who keeps a log."""

    def _changed(self, request_id: str, state: str) -> None:
        """A request of ours, or one that was to be aborted, is in this state now: for who keeps a log."""

    async def _change(
        self,
        name: str,
        claim: Claim,
        before: tuple[Any, ...],
        after: tuple[Any, ...],
        patience_s: float = PATIENCE_S,
    ) -> str:
        """A script under a fence; what it tells goes to the followers without another reading. Returns the state."""
        seen = self._followers.seen_by_all(claim.request_id)
        arguments = (claim.request_id, claim.fence, self._owner, *before, seen, READ_EVENTS, *after)
        keys = [request_key(claim.request_id), LEASES]
        state, entries, flat = await self._scripts.run(name, keys, *arguments, patience_s=patience_s)
        self._followers.give(claim.request_id, seen, stored_events(entries, flat))
        if len(entries) == READ_EVENTS:
            self._followers.wake(claim.request_id)
        return str(state.decode())


def _overloaded(ticket: Ticket, stored: int, drained_s: float) -> Overloaded:
    retry_after_s = min(max(drained_s, 1.0), MAX_RETRY_AFTER_S)
    if stored == QUEUE_FULL:
        return Overloaded(f"{ticket.max_queued} requests wait already: try again later", retry_after_s=retry_after_s)
    if stored == WORK_FULL:
        message = "the work that waits already is as much as the queue takes: try again later"
        return Overloaded(message, retry_after_s=retry_after_s)
    message = f"{ticket.max_queued_tenant} of your requests wait already: try again when some have run"
    return Overloaded(message, retry_after_s=retry_after_s)


def _wanted(offer: Offer) -> tuple[str, str]:
    """What suits a replica, and what its requests may need of other stages."""
    return " ".join(offer.batches), "" if offer.feeds is None else json.dumps(list(offer.feeds))


def _flat(fields: Fields) -> list[Any]:
    return [part for pair in fields.items() for part in pair]
