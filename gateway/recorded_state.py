"""The state with a log: whatever accepts or ends a request here is told to a RequestLog, once for every request."""

from __future__ import annotations

import asyncio
import logging

from gateway.config import RedisSection
from gateway.records import TERMINAL, request_key
from gateway.request_log import Ending, RequestLog
from gateway.state import Fields, State
from gateway.ticket import Ticket
from services.errors import StateStoreDown

# What is told of an end waits so long.
BEHIND_S = 0.05

log = logging.getLogger(__name__)


class RecordedState(State):
    """As State. Of one change that ends a request, only the first that hears of it tells the log."""

    def __init__(self, redis: RedisSection, owner: str, requests: RequestLog) -> None:
        super().__init__(redis, owner)
        self._requests = requests
        self._telling: set[asyncio.Task[None]] = set()

    def _accepted(self, request_id: str, ticket: Ticket, fields: Fields) -> None:
        model, traceparent = str(fields.get("model", "")), str(fields.get("traceparent", ""))
        self._requests.accepted(request_id, model, ticket.tenant, traceparent)

    def _changed(self, request_id: str, state: str) -> None:
        if state in TERMINAL:
            # Beside the work: nobody waits for the log.
            telling = asyncio.create_task(self._tell(request_id))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    async def _tell(self, request_id: str) -> None:
        # The client's answer is on its way through this event loop: it goes first.
        await asyncio.sleep(BEHIND_S)
        try:
            # An abort of a request that has ended finds it ended, like a second gateway that lost the race.
            values = await self._scripts.run("told", [request_key(request_id)], *Ending.FIELDS)
        except StateStoreDown:
            log.warning("the end of %s could not be counted: Redis is away", request_id)
            return
        record = {name: value for name, value in zip(Ending.FIELDS, values or (), strict=False) if value is not None}
        if "updated" in record:
            self._requests.ended(Ending.of(request_id, record))

    async def close(self) -> None:
        """As State.close; what is to be told is told before."""
        await asyncio.gather(*self._telling, return_exceptions=True)
        await super().close()
