"""Server-sent events: how one is written, and the answer that is a stream of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

EVENTS = "text/event-stream"
REQUEST_ID = "x-request-id"


def event_text(name: str, data: dict[str, Any], event_id: str = "") -> str:
    """One event; with an id, a client can go on after it (`Last-Event-ID`)."""
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {name}\ndata: {json.dumps(data)}\n\n"


def typed_event(kind: str, data: dict[str, Any]) -> str:
    """One event of OpenAI's streams: its name stands in the data too."""
    return event_text(kind, {"type": kind} | data)


def event_stream(texts: AsyncIterator[str], request_id: str) -> StreamingResponse:
    """The answer, with the id of the request that it is about."""
    headers = {"Cache-Control": "no-cache", REQUEST_ID: request_id}
    return StreamingResponse(texts, media_type=EVENTS, headers=headers)
