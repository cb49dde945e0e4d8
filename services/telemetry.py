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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

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


@dataclass(slots=True)
class Span:
    """A piece of one process's time on a request. Times in nanoseconds, start since the Unix epoch."""

    name: str
    process: str
    start_unix_ns: int
    duration_ns: int = 0
    attributes: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def span(name: str, process: str, attributes: Mapping[str, str] | None = None) -> Iterator[Span]:
    """Times what runs inside; the yielded span is complete afterwards (also after an exception)."""
    started_ns = time.perf_counter_ns()
    timed = Span(name, process, time.time_ns(), attributes=dict(attributes or {}))
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


def make_traceparent() -> str:
    """A new trace, sampled."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def child_traceparent(parent: str) -> str:
    """The same trace with a new span id; a new trace when `parent` is not valid."""
    match = _TRACEPARENT.fullmatch(parent)
    if not match or not parse_traceparent(parent):
        return make_traceparent()
    return f"00-{match[1]}-{secrets.token_hex(8)}-{match[3]}"


class Figures(Collector):
    """Exports a process's own numbers, read when Prometheus asks.

    `read` gives plain figures by name; they appear as `lightloom_<name>`, as a counter when the name ends in `_total`
    and as a gauge otherwise.
    """

    def __init__(self, read: Callable[[], Mapping[str, float]], labels: Mapping[str, str]) -> None:
        self._read = read
        self._labels = dict(labels)

    def collect(self) -> Iterator[Metric]:
        """One metric family a figure."""
        names = list(self._labels)
        for key, value in self._read().items():
            name = "lightloom_" + re.sub(r"[^a-zA-Z0-9_]", "_", key)
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = family(name, key.replace("_", " "), labels=names)
            metric.add_metric(list(self._labels.values()), value)
            yield metric


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
