"""One timed request against a gateway, and statistics over many: shared by the serving benchmarks."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc

from protos import gateway_pb2, gateway_pb2_grpc, types_pb2

PROMPTS = (
    "a red circle on a white background",
    "a large blue star above a small green square on a yellow background",
    "a purple heart to the left of an orange triangle on a black background",
    "three shapes: a small cyan ring, a big pink cross and a green diamond, on a white background",
)

# What ranks say of their time with a request, from its arrival to their answer.
STAGE_SPANS = ("text.encode", "vae.encode", "dit.denoise", "vae.decode")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request as its client saw it.

    `busy_s` is what the rank processes spent on it, by stage; `seconds` runs from the planned arrival. `queued_s` is
    the time in queues, `turns_s` the time that it spent in a stage's rank while that did not work on it: when others
    had their turn, and between two steps. `spans` are name, start and length in milliseconds, from the first start on.
    `step_s` are the seconds of the steps that were told of: five in any second at most.
    """

    seconds: float
    busy_s: dict[str, float]
    error: str = ""
    queued_s: float = 0.0
    turns_s: float = 0.0
    spans: tuple[tuple[str, float, float], ...] = ()
    step_s: tuple[float, ...] = ()

    @property
    def outside_s(self) -> float:
        """Client seconds in which no rank worked on the request."""
        return self.seconds - sum(self.busy_s.values())

    @property
    def under_way_s(self) -> float:
        """What is left of `outside_s` without the waiting for others: messages, state, files."""
        return self.outside_s - self.queued_s - self.turns_s


@dataclass(frozen=True, slots=True)
class Work:
    """What every request asks for; `more` are fields of GenerationParams beside the named ones."""

    model: str
    size_px: int
    steps: int
    guidance: float
    timeout_s: float = 600.0
    more: Mapping[str, Any] = field(default_factory=dict)


def prompt(number: int) -> str:
    """A prompt that no other number has, so no cache knows it."""
    return f"{PROMPTS[number % len(PROMPTS)]} ({number})"


async def timed_request(stub: gateway_pb2_grpc.GatewayStub, work: Work, index: int, planned_s: float) -> Outcome:
    """Makes one picture and waits for its bytes; `planned_s` is a `time.perf_counter` moment."""
    wish: dict[str, Any] = {
        "model": work.model,
        "prompt": prompt(index),
        "width": work.size_px,
        "height": work.size_px,
        "steps": work.steps,
        "guidance": work.guidance,
        "seed": index,
    }
    params = types_pb2.GenerationParams(**(wish | dict(work.more)))
    request = gateway_pb2.GenerateRequest(params=params, inline_artifact=True)
    done: gateway_pb2.RequestStatus | None = None
    step_s: list[float] = []
    try:
        async for event in stub.Generate(request, timeout=work.timeout_s):
            if event.WhichOneof("event") == "status" and event.status.state == gateway_pb2.REQUEST_STATE_DONE:
                done = event.status
            elif event.WhichOneof("event") == "step":
                step_s.append(event.step.seconds)
    except grpc.aio.AioRpcError as failure:
        return Outcome(time.perf_counter() - planned_s, {}, f"{failure.code().name}: {failure.details()}")
    seconds = time.perf_counter() - planned_s
    if done is None:
        return Outcome(seconds, {}, "no terminal event")
    trace = await stub.Trace(gateway_pb2.TraceRequest(request_id=done.request_id))
    in_stages_s = sum(span.duration_ns for span in trace.spans if span.name in STAGE_SPANS) / 1e9
    turns_s = max(0.0, in_stages_s - sum(done.busy_s.values()))
    first_ns = min(span.start_unix_ns for span in trace.spans)
    spans = tuple(
        (span.name, round((span.start_unix_ns - first_ns) / 1e6, 2), round(span.duration_ns / 1e6, 2))
        for span in sorted(trace.spans, key=lambda span: int(span.start_unix_ns))
    )
    return Outcome(seconds, dict(done.busy_s), "", done.queued_s, turns_s, spans, tuple(step_s))


def summary(outcomes: Sequence[Outcome], wall_s: float, slo_s: float | None = None) -> dict[str, Any]:
    """Counts, rates and percentiles in plain numbers (seconds)."""
    good = [outcome for outcome in outcomes if not outcome.error]
    seconds = [outcome.seconds for outcome in good]
    result: dict[str, Any] = {
        "requests": len(outcomes),
        "errors": len(outcomes) - len(good),
        "wall_s": wall_s,
        "throughput_per_s": len(good) / wall_s,
        "latency_p50_s": percentile(seconds, 50),
        "latency_p95_s": percentile(seconds, 95),
        "outside_p50_ms": 1000 * percentile([outcome.outside_s for outcome in good], 50),
        "outside_p95_ms": 1000 * percentile([outcome.outside_s for outcome in good], 95),
        "queued_p50_ms": 1000 * percentile([outcome.queued_s for outcome in good], 50),
        "turns_p50_ms": 1000 * percentile([outcome.turns_s for outcome in good], 50),
        "under_way_p50_ms": 1000 * percentile([outcome.under_way_s for outcome in good], 50),
        "busy_mean_s": {
            stage: statistics.fmean(o.busy_s.get(stage, 0.0) for o in good)
            for stage in sorted({stage for o in good for stage in o.busy_s})
        },
    }
    if slo_s is not None:
        in_time = sum(value <= slo_s for value in seconds)
        result |= {"slo_s": slo_s, "goodput_per_s": in_time / wall_s, "in_time_share": in_time / max(1, len(outcomes))}
    if len(good) < len(outcomes):
        result["first_error"] = next(outcome.error for outcome in outcomes if outcome.error)
    return result


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile; NaN for no values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def write_result(path: Path | None, name: str, facts: dict[str, Any]) -> None:
    """Prints the figures as JSON and, with a path, keeps them with the machine's facts."""
    record = {"benchmark": name, "machine": {"python": platform.python_version(), "cpu": platform.machine()}, **facts}
    text = json.dumps(record, indent=2, default=asdict)
    print(text)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
