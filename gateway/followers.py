"""Who follows a request at this gateway, and the events that are on their way to them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from gateway.records import TERMINAL
from services.errors import StateStoreDown

READ_EVENTS = 256
WATCH_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event of the stream: kind `status` (with the state and the record), `step` or `preview` (with the payload)."""

    event_id: str
    kind: str
    state: str
    payload: bytes
    record: dict[str, bytes]


class Follower:
    """One reader of a request's events, in order and without gaps.

    `seen` is the last event it was given; `behind` says that there may be more to read than what waits here.
    """

    def __init__(self, seen: str) -> None:
        self.seen = seen
        self.behind = True
        self._waiting: deque[StoredEvent] = deque()
        self._changed = asyncio.Event()

    def give(self, events: Sequence[StoredEvent]) -> None:
        """Takes the events after `seen`, or after an earlier one, as far as they are new."""
        for event in events:
            if _place(event.event_id) > _place(self.seen):
                self._waiting.append(event)
                self.seen = event.event_id
        self._changed.set()

    def wake(self) -> None:
        """There is something to read."""
        self.behind = True
        self._changed.set()

    def take(self) -> list[StoredEvent]:
        """The events that wait."""
        events = list(self._waiting)
        self._waiting.clear()
        return events

    async def wait(self, timeout_s: float) -> None:
        """Waits for events, or for news of some; after `timeout_s` there may be some that nobody told of."""
        # Not by wait_for: in Python 3.11 it swallows a cancel that comes together with the event.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        self.behind = self.behind or not self._changed.is_set()
        self._changed.clear()


class Followers:
    """All of them, by request."""

    def __init__(self) -> None:
        self._by_request: dict[str, set[Follower]] = {}

    @contextlib.contextmanager
    def joined(self, request_id: str, seen: str) -> Iterator[Follower]:
        """A new follower, for as long as the block runs."""
        follower = Follower(seen)
        others = self._by_request.setdefault(request_id, set())
        others.add(follower)
        try:
            yield follower
        finally:
            others.discard(follower)
            if not others:
                self._by_request.pop(request_id, None)

    async def follow(
        self, request_id: str, after: str, read: Callable[[str, str], Awaitable[tuple[Sequence[StoredEvent], bool]]]
    ) -> AsyncIterator[StoredEvent]:
        """Events later than `after`, until a terminal status; none when that was it. Once begun, it waits for Redis.

        Args:
            read: the next READ_EVENTS events of a request after one, and whether they are the last that there will be;
                raises StateStoreDown while it cannot.
        """
        begun = ended = False
        with self.joined(request_id, after) as follower:
            while True:
                if follower.behind:
                    follower.behind = False
                    try:
                        events, ended = await read(request_id, follower.seen)
                        follower.give(events)
                        follower.behind = follower.behind or len(events) == READ_EVENTS
                    except StateStoreDown:
                        if not begun:
                            raise
                        follower.behind = True
                        continue
                begun = True
                for event in follower.take():
                    if event.kind == "preview" and not event.payload:
                        # The request has ended, and its previews have been forgotten.
                        continue
                    yield event
                    if event.kind == "status" and event.state in TERMINAL:
                        return
                if ended:
                    return
                if not follower.behind:
                    await follower.wait(WATCH_TIMEOUT_S)

    def seen_by_all(self, request_id: str) -> str:
        """The last event that all of a request's followers have; empty when it has none."""
        return min((f.seen for f in self._by_request.get(request_id, ())), key=_place, default="")

    def give(self, request_id: str, after: str, events: Sequence[StoredEvent]) -> None:
        """Hands on the events that came after `after`, what `seen_by_all` said before they were read.

        Who has joined since and has seen less would be left with a gap: it is woken to read by itself.
        """
        for follower in self._by_request.get(request_id, ()):
            if after and _place(follower.seen) >= _place(after):
                follower.give(events)
            else:
                follower.wake()

    def wake(self, request_id: str) -> None:
        """They have something to read."""
        for follower in self._by_request.get(request_id, ()):
            follower.wake()


def _place(event_id: str) -> tuple[int, int]:
    milliseconds, _, number = event_id.partition("-")
    return int(milliseconds), int(number or 0)


def stored_events(entries: Sequence[tuple[bytes, Sequence[bytes]]], flat: Sequence[bytes]) -> list[StoredEvent]:
    """Entries of a request's stream; a status comes with the record, given as Redis gives a hash."""
    record = record_of(flat)
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


def record_of(flat: Sequence[bytes]) -> dict[str, bytes]:
    """A hash as Redis gives it to a script."""
    return {key.decode(): value for key, value in zip(flat[::2], flat[1::2], strict=True)}
