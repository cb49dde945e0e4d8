"""Logs, traces and metrics of every process: JSON lines on stderr, spans, W3C trace context, Prometheus.

A log line is one JSON object with `time`, `level`, `process`, `message` and, inside a request, `request_id` and
`trace_id`. What is passed as `extra=` becomes further keys. Prompts and media are never logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from protos import types_pb2
from services.errors import Internal, StartupError

request_id_var: ContextVar[str] = ContextVar("request_id", default="")
traceparent_var: ContextVar[str] = ContextVar("traceparent", default="")

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_log = logging.getLogger(__name__)
_STANDARD_ATTRIBUTES = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"))


def setup(process_name: str, level: int = logging.INFO) -> None:
    """Sends all logging of this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process_name))
    logging.basicConfig(level=level, handlers=[handler], force=True)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; values that JSON cannot hold are written as text."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process_name,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := request_id_var.get():
            line["request_id"] = request_id
        if parsed := parse_traceparent(traceparent_var.get()):
            line["trace_id"] = parsed[0]
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD_ATTRIBUTES}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def internal_error(error: BaseException, request_id: str = "") -> Internal:
    """What the caller may see of a bug: an id. The trace goes to the log under the same id."""
    error_id = uuid.uuid4().hex[:12]
    _log.error("internal error", exc_info=error, extra={"error_id": error_id})
    return Internal(f"internal error {error_id}: the log has the trace", request_id=request_id)


@contextlib.contextmanager
def request_context(request_id: str, traceparent: str = "") -> Iterator[None]:
    """Log lines written inside carry the request's id and trace."""
    tokens = request_id_var.set(request_id), traceparent_var.set(traceparent)
    try:
        yield
    finally:
        request_id_var.reset(tokens[0])
        traceparent_var.reset(tokens[1])


def make_span(
    name: str, process: str, start_unix_ns: int, end_unix_ns: int, attributes: Mapping[str, str] | None = None
) -> types_pb2.Span:
    """A finished piece of one process's time on a request."""
    return types_pb2.Span(
        name=name,
        process=process,
        start_unix_ns=start_unix_ns,
        duration_ns=max(0, end_unix_ns - start_unix_ns),
        attributes=dict(attributes or {}),
    )


@contextlib.contextmanager
def span(name: str, process: str, attributes: Mapping[str, str] | None = None) -> Iterator[types_pb2.Span]:
    """Times what runs inside; the yielded span is complete afterwards (also after an exception)."""
    started_ns = time.perf_counter_ns()
    timed = make_span(name, process, now_ns := time.time_ns(), now_ns, attributes)
    try:
        yield timed
    finally:
        timed.duration_ns = time.perf_counter_ns() - started_ns


def parse_traceparent(text: str) -> tuple[str, str] | None:
    """(trace id, parent id) of a W3C traceparent (version 00), or None when it is not one."""
    match = _TRACEPARENT.fullmatch(text)
    if not match or match[1] == "0" * 32 or match[2] == "0" * 16:
        return None
    return match[1], match[2]


def new_traceparent(parent: str = "") -> str:
    """A new span of the parent's trace, or of a new trace (sampled) when `parent` is not valid."""
    parsed = parse_traceparent(parent)
    trace_id, flags = (parsed[0], parent[-2:]) if parsed else (secrets.token_hex(16), "01")
    return f"00-{trace_id}-{secrets.token_hex(8)}-{flags}"


class Figures(Collector):
    """Exports a process's own numbers, read when Prometheus asks.

    `read` gives plain figures by name; they appear as `lightloom_<name>`, as a counter when the name ends in `_total`
    and as a gauge otherwise.
    """

    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """One metric family a figure."""
        for key, value in self._read().items():
            name = "lightloom_" + re.sub(r"[^a-zA-Z0-9_]", "_", key)
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(name, key.replace("_", " "), value=value)


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> Callable[[], None]:
    """Serves `/metrics` from a thread; returns what stops it.

    Raises:
        StartupError: the port is in use.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise StartupError(f"metrics port {host}:{port} cannot be bound: {error.strerror}") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
