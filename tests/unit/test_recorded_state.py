"""What is told of a request's end, on a real Redis."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from gateway.config import RedisSection
from gateway.recorded_state import RecordedState
from gateway.records import queue_key, request_key
from gateway.request_log import RequestLog
from gateway.ticket import Ticket

FIELDS = {"params": b"", "traceparent": "", "model": "m"}


async def test_the_end_of_a_request_that_a_failover_lost_leaves_nothing_of_it(url: str) -> None:
    state = RecordedState(RedisSection(url=url), "gateway", RequestLog(CollectorRegistry()))
    await state.submit("r", queue_key("dit", "d"), Ticket(), FIELDS)
    await state.abort("r")
    # The new primary has not heard of it, and its client may submit it once more under its id.
    await state._scripts.redis.flushall()
    telling = list(state._telling)
    for task in telling:
        await task
    assert telling and not await state._scripts.redis.exists(request_key("r"))
    await state.close()
