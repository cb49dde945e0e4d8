"""Logs, spans and trace context: one JSON line an event, with the request's id on every line.

Trace context is W3C's `traceparent`: it comes with a client's call, travels in gRPC metadata, and names the request in
other systems' traces too.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from protos import types_pb2

request_id_var: ContextVar[str] = ContextVar("request_id", default="")
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "taskName"}


class JsonFormatter(logging.Formatter):
    """time, level, process, logger, message, request_id, and whatever `extra` adds."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        entry: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = request_id_var.get()
        if request_id:
            entry["request_id"] = request_id
        entry |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def setup(process: str, level: int = logging.INFO) -> None:
    """Sends all logs of this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "asyncio", "uvicorn.access", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def new_traceparent(parent: str = "") -> str:
    """A child of `parent` (same trace, new span), or a new trace when there is none or it is malformed."""
    parts = parent.split("-")
    valid = len(parts) == 4 and len(parts[1]) == 32 and set(parts[1]) <= set("0123456789abcdef") and int(parts[1], 16)
    trace = parts[1] if valid else secrets.token_hex(16)
    return f"00-{trace}-{secrets.token_hex(8)}-01"


def make_span(
    name: str, process: str, start_unix_ns: int, end_unix_ns: int, attributes: Mapping[str, str] | None = None
) -> types_pb2.Span:
    """A finished piece of time."""
    return types_pb2.Span(
        name=name,
        process=process,
        start_unix_ns=start_unix_ns,
        duration_ns=max(0, end_unix_ns - start_unix_ns),
        attributes=dict(attributes or {}),
    )


@contextmanager
def span(spans: list[types_pb2.Span], name: str, process: str) -> Iterator[None]:
    """Appends the span of the block to `spans`, also when the block fails."""
    start = time.time_ns()
    try:
        yield
    finally:
        spans.append(make_span(name, process, start, time.time_ns()))
