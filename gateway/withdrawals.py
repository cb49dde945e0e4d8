"""What was refused although Redis may have done it: undone as soon as it answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from services.errors import ServiceError

log = logging.getLogger(__name__)

MAX_WAITING = 10_000
RETRY_S = 0.1
T = TypeVar("T")


class Withdrawals(Generic[T]):
    """What waits to be withdrawn, and one task that works on it while there is any: an outage may refuse very many.

    Args:
        withdraw: undoes one; raises a ServiceError while it cannot.
    """

    def __init__(self, withdraw: Callable[[T], Awaitable[None]], max_waiting: int = MAX_WAITING) -> None:
        self._withdraw = withdraw
        self._max_waiting = max_waiting
        # As an ordered set.
        self._waiting: dict[T, None] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, refused: T) -> None:
        """Notes one, unless too many wait already."""
        if len(self._waiting) >= self._max_waiting:
            log.warning("%d withdrawals wait: %s may run for nobody", self._max_waiting, refused)
            return
        self._waiting[refused] = None
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while self._waiting:
            oldest = next(iter(self._waiting))
            try:
                await self._withdraw(oldest)
            except ServiceError:
                await asyncio.sleep(RETRY_S)
            else:
                del self._waiting[oldest]
