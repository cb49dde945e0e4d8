"""What became of requests: Prometheus counts and times, and one log line when one is accepted, refused, or has ended.

The gateway at which something happens tells of it, once: sum over all gateways.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from prometheus_client import CollectorRegistry, Counter, Histogram

from protos import types_pb2
from services.errors import ServiceError
from services.telemetry import request_context

log = logging.getLogger(__name__)

# A client may send any word as method.
METHODS = ("GET", "HEAD", "POST", "DELETE")
WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1800, 3600)
QUEUED_S = (0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1800, 3600)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ended. `seconds` since its submit; `queued_s` in queues, None for one that never left its queue."""

    request_id: str
    state: str
    model: str
    code: str
    seconds: float
    queued_s: float | None
    attempt: int
    traceparent: str

    # Of a request's record, what `of` needs.
    FIELDS: ClassVar[tuple[str, ...]] = (
        "state",
        "model",
        "error",
        "created",
        "updated",
        "queued_s",
        "attempt",
        "traceparent",
    )

    @classmethod
    def of(cls, request_id: str, values: Mapping[str, bytes]) -> Ending:
        """From the stored record, which has ended."""
        state = values["state"].decode()
        error = types_pb2.ErrorDetail.FromString(values["error"]).reason if "error" in values else ""
        return cls(
            request_id=request_id,
            state=state,
            model=values.get("model", b"").decode(),
            # An error that was noted before is not what a finished or aborted request ended with.
            code={"done": "", "cancelled": "cancelled"}.get(state, error),
            seconds=float(values["updated"]) - float(values["created"]),
            queued_s=float(values["queued_s"]) if "queued_s" in values else None,
            attempt=int(values.get("attempt", b"0")),
            traceparent=values.get("traceparent", b"").decode(),
        )


class RequestLog:
    """Takes what happens. Labels: models that are served, states, and codes of `services/errors.py`; never a caller's.

    Args:
        registry: of the metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "lightloom_requests",
            "Requests by what became of them: accepted, refused, done, failed, cancelled, expired",
            ["model", "state", "code"],
            registry=registry,
        )
        self._seconds = Histogram(
            "lightloom_request_seconds",
            "Seconds from a request's submit to its end",
            ["model", "state"],
            registry=registry,
            buckets=WHOLE_S,
        )
        self._queued = Histogram(
            "lightloom_request_queued_seconds",
            "Seconds that a request which has ended had waited in queues",
            ["model"],
            registry=registry,
            buckets=QUEUED_S,
        )
        self._answers = Counter(
            "lightloom_http_responses",
            "Answers of the REST front by route",
            ["method", "route", "status"],
            registry=registry,
        )

    def accepted(self, request_id: str, model: str, tenant: str, traceparent: str) -> None:
        """A new request is stored."""
        self._requests.labels(model, "accepted", "").inc()
        with request_context(request_id, traceparent):
            log.info("accepted", extra={"model": model, "tenant": tenant})

    def refused(self, error: ServiceError, model: str = "", tenant: str = "") -> None:
        """A request was not taken.

        Args:
            model: one that is served; empty otherwise.
        """
        self._requests.labels(model, "refused", error.reason).inc()
        log.info("refused", extra={"model": model, "tenant": tenant, "code": error.reason, "param": error.param})

    def ended(self, ending: Ending) -> None:
        """A request has reached its last state."""
        self._requests.labels(ending.model, ending.state, ending.code).inc()
        self._seconds.labels(ending.model, ending.state).observe(ending.seconds)
        if ending.queued_s is not None:
            self._queued.labels(ending.model).observe(ending.queued_s)
        facts = {
            "model": ending.model,
            "code": ending.code,
            "seconds": round(ending.seconds, 3),
            "queued_s": None if ending.queued_s is None else round(ending.queued_s, 3),
            "attempt": ending.attempt,
        }
        with request_context(ending.request_id, ending.traceparent):
            log.info(ending.state, extra=facts)

    def answered(self, method: str, route: str, status: int) -> None:
        """The REST front has answered.

        Args:
            route: as it is written in the API; empty for a path that is none.
        """
        known = method if method in METHODS and route else "other"
        self._answers.labels(known, route, str(status)).inc()
