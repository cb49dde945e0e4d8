"""Log lines are JSON with the request's id, spans and trace context are well formed, figures reach Prometheus."""

from __future__ import annotations

import json
import logging
import socket
import time
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from services.errors import Internal, StartupError
from services.telemetry import (
    Figures,
    JsonFormatter,
    internal_error,
    make_span,
    new_traceparent,
    parse_traceparent,
    request_context,
    serve_metrics,
    span,
)

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


def line(message: str, *args: object, **extra: object) -> dict[str, object]:
    record = logging.getLogger("x").makeRecord("x", logging.INFO, "f", 1, message, args, None, extra=extra)
    text = JsonFormatter("dit-1").format(record)
    assert "\n" not in text
    return json.loads(text)


def test_log_lines() -> None:
    outside = line("%d of %d\nsteps", 1, 2, step_s=0.5, path=object)
    assert outside["message"] == "1 of 2\nsteps" and outside["step_s"] == 0.5
    assert outside["process"] == "dit-1" and outside["level"] == "info" and "request_id" not in outside
    with request_context("r1", PARENT):
        inside = line("stepped")
    assert (inside["request_id"], inside["trace_id"]) == ("r1", "0af7651916cd43dd8448eb211c80319c")
    assert "request_id" not in line("later")


def test_a_bug_shows_its_id_only(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise KeyError("secret")
    except KeyError as error:
        shown = internal_error(error, "r1")
    assert isinstance(shown, Internal) and shown.request_id == "r1" and "secret" not in shown.message
    record = caplog.records[-1]
    assert record.error_id in shown.message and record.exc_info[0] is KeyError


def test_spans() -> None:
    before = time.time_ns()
    with pytest.raises(ValueError), span("dit.denoise", "dit-1", {"steps": "4"}) as timed:
        time.sleep(0.01)
        raise ValueError
    assert timed.duration_ns >= 10_000_000 and before <= timed.start_unix_ns <= time.time_ns()
    assert (timed.name, timed.process, dict(timed.attributes)) == ("dit.denoise", "dit-1", {"steps": "4"})
    assert make_span("a", "b", 100, 250).duration_ns == 150
    assert make_span("a", "b", 100, 90).duration_ns == 0


def test_trace_context() -> None:
    fresh, child = new_traceparent(), new_traceparent(PARENT)
    trace, parent = parse_traceparent(PARENT)
    assert parse_traceparent(fresh) and parse_traceparent(fresh) != parse_traceparent(new_traceparent())
    assert parse_traceparent(child)[0] == trace and parse_traceparent(child)[1] != parent
    assert child.endswith("-00")


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", PARENT.upper(), PARENT + "-x", "01" + PARENT[2:], f"00-{'0' * 32}-b7ad6b7169203331-01"],
)
def test_bad_trace_context_starts_a_new_trace(text: str) -> None:
    assert parse_traceparent(text) is None
    assert parse_traceparent(new_traceparent(text))


def test_figures() -> None:
    registry = CollectorRegistry()
    registry.register(Figures(lambda: {"queue depth/now": 3.0, "cancelled_total": 2.0}))
    page = generate_latest(registry).decode()
    assert "lightloom_queue_depth_now 3.0" in page
    assert "# TYPE lightloom_cancelled_total counter" in page and "lightloom_cancelled_total 2.0" in page


def test_metrics_page_and_its_port() -> None:
    registry = CollectorRegistry()
    registry.register(Figures(lambda: {"ready": 1.0}))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=str(port)):
            serve_metrics(registry, "127.0.0.1", port)
    stop = serve_metrics(registry, "127.0.0.1", port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        assert b"lightloom_ready 1.0" in answer.read()
    stop()
