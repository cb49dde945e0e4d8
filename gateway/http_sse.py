"""Server-sent events: how one is written, and the answer that is a stream of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

EVENTS = "text/event-stream"
REQUEST_ID = "x-request-id"
# Proxies cut a connection that has been silent for a minute, some after half of one.
HEARTBEAT_S = 10.0
# A comment: clients pass over it.
HEARTBEAT = ": still here\n\n"


def event_text(name: str, data: dict[str, Any], event_id: str = "") -> str:
    """One event; with an id, a client can go on after it (`Last-Event-ID`)."""
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {name}\ndata: {json.dumps(data)}\n\n"


def typed_event(kind: str, data: dict[str, Any]) -> str:
    """One event of OpenAI's streams: its name stands in the data too."""
    return event_text(kind, {"type": kind} | data)


def event_stream(texts: AsyncGenerator[str], request_id: str) -> StreamingResponse:
    """The answer, with the id of the request that it is about; it is never silent for long."""
    headers = {"Cache-Control": "no-cache", REQUEST_ID: request_id}
    return StreamingResponse(with_heartbeat(texts, HEARTBEAT_S), media_type=EVENTS, headers=headers)


async def with_heartbeat(texts: AsyncGenerator[str], pause_s: float) -> AsyncIterator[str]:
    """The texts, and a heartbeat whenever nothing has come for `pause_s`. Whoever leaves closes `texts`."""
    coming: asyncio.Task[str | None] | None = None
    try:
        while True:
            coming = asyncio.create_task(_next(texts))
            while not coming.done():
                await asyncio.wait({coming}, timeout=pause_s)
                if not coming.done():
                    yield HEARTBEAT
            text = coming.result()
            if text is None:
                return
            yield text
    finally:
        if coming is not None:
            coming.cancel()
        # The server cancels again and again until it is left; what the texts' end has to do must not fall to that.
        await asyncio.shield(asyncio.create_task(_close(texts, coming)))


async def _next(texts: AsyncGenerator[str]) -> str | None:
    return await anext(texts, None)


async def _close(texts: AsyncGenerator[str], coming: asyncio.Task[str | None] | None) -> None:
    if coming is not None:
        await asyncio.wait({coming})
    await texts.aclose()
