"""Requests that were refused although Redis may have stored them: withdrawn as soon as it answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from services.errors import ServiceError

log = logging.getLogger(__name__)

MAX_WAITING = 10_000
RETRY_S = 0.1


class Withdrawals:
    """The ids that wait, and one task that works on them while there are any: an outage may refuse very many."""

    def __init__(self, withdraw: Callable[[str], Awaitable[None]], max_waiting: int = MAX_WAITING) -> None:
        self._withdraw = withdraw
        self._max_waiting = max_waiting
        # As an ordered set.
        self._waiting: dict[str, None] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, request_id: str) -> None:
        """Notes a request, unless too many wait already."""
        if len(self._waiting) >= self._max_waiting:
            log.warning("%d withdrawals wait: %s may run for nobody", self._max_waiting, request_id)
            return
        self._waiting[request_id] = None
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while self._waiting:
            request_id = next(iter(self._waiting))
            try:
                await self._withdraw(request_id)
            except ServiceError:
                await asyncio.sleep(RETRY_S)
            else:
                del self._waiting[request_id]
