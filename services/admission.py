"""Who may call a stage now: slots, fences, one call at a time for each request and method, and who runs alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from protos import types_pb2
from services.errors import Overloaded, StaleFence
from services.rank_group import RankCall

MAX_FENCES = 10_000
RETRY_AFTER_S = 1.0


@dataclass(slots=True)
class _Running:
    """A call in work."""

    fence: int
    call: RankCall


@dataclass(frozen=True, slots=True, eq=False)
class _Visit:
    """A call that is in work, or waits for that."""

    request_id: str
    alone: bool

    def bears(self, other: _Visit) -> bool:
        """Whether both may run beside each other. Calls of one request may: it can have more than one at a stage."""
        return self.request_id == other.request_id or not (self.alone or other.alone)


class Admission:
    """Who may call now: not too many at once, and never an owner that has lost its lease."""

    def __init__(self, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self._fences: OrderedDict[str, int] = OrderedDict()
        self._running: dict[tuple[str, str], _Running] = {}
        self._inside: set[_Visit] = set()
        self._waiting: deque[_Visit] = deque()
        self._moved = asyncio.Event()
        self.in_flight = 0

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Holds one of the slots.

        Raises:
            Overloaded: none is free.
        """
        if self.in_flight >= self._max_in_flight:
            raise Overloaded(f"all {self._max_in_flight} slots of the replica are taken", retry_after_s=RETRY_AFTER_S)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    @contextlib.asynccontextmanager
    async def place(self, context: types_pb2.RequestContext) -> AsyncIterator[None]:
        """A place beside the calls that run. Who wants to be alone waits until they have ended, and who comes after it
        waits for its end: its worker may die of it.
        """
        mine = _Visit(context.request_id, context.alone)
        self._waiting.append(mine)
        try:
            while self._waiting[0] is not mine or not all(mine.bears(other) for other in self._inside):
                self._moved.clear()
                await self._moved.wait()
        finally:
            self._waiting.remove(mine)
            self._moved.set()
        self._inside.add(mine)
        try:
            yield
        finally:
            self._inside.remove(mine)
            self._moved.set()

    def take_over(self, method: str, context: types_pb2.RequestContext) -> None:
        """Ends an older call of the same request, whose owner is gone or has lost its lease.

        Raises:
            StaleFence: a newer owner has called before.
        """
        self._note_fence(context)
        older = self._running.pop((method, context.request_id), None)
        if older is not None:
            older.call.cancel(StaleFence(f"a call with fence {context.fence} took over from fence {older.fence}"))

    def release(self, context: types_pb2.RequestContext) -> None:
        """Ends all calls of a request with an older fence: it has been taken away from their owner, which may be
        silent.

        Raises:
            StaleFence: a newer owner has called before.
        """
        self._note_fence(context)
        for key, running in list(self._running.items()):
            if key[1] == context.request_id and running.fence < context.fence:
                del self._running[key]
                running.call.cancel(StaleFence(f"the request was taken away from the owner with fence {running.fence}"))

    def _note_fence(self, context: types_pb2.RequestContext) -> None:
        # Of the newest requests: a fence is not remembered for ever.
        highest = max(self._fences.pop(context.request_id, 0), context.fence)
        self._fences[context.request_id] = highest
        if len(self._fences) > MAX_FENCES:
            self._fences.popitem(last=False)
        if context.fence < highest:
            raise StaleFence(
                f"fence {context.fence} is stale: the request's owner has {highest}", request_id=context.request_id
            )

    @contextlib.contextmanager
    def running(self, method: str, context: types_pb2.RequestContext, call: RankCall) -> Iterator[None]:
        """Notes the call as the only one of its request and method."""
        key = method, context.request_id
        mine = self._running[key] = _Running(context.fence, call)
        try:
            yield
        finally:
            if self._running.get(key) is mine:
                del self._running[key]
