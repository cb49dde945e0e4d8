"""One timed request against a gateway, and statistics over many: shared by the serving benchmarks."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request as its client saw it.

    `busy_s` is what the rank processes spent on it, by stage; `seconds` runs from the planned arrival.
    """

    seconds: float
    busy_s: dict[str, float]
    error: str = ""

    @property
    def outside_s(self) -> float:
        """Client seconds in which no rank worked on the request."""
        return self.seconds - sum(self.busy_s.values())


@dataclass(frozen=True, slots=True)
class Work:
    """What every request asks for."""

    model: str
    size_px: int
    steps: int
    guidance: float
    timeout_s: float = 600.0


async def timed_request(stub: gateway_pb2_grpc.GatewayStub, work: Work, index: int, planned_s: float) -> Outcome:
    """Makes one picture and waits for its bytes; `planned_s` is a `time.perf_counter` moment."""
    params = types_pb2.GenerationParams(
        model=work.model,
        prompt=f"{PROMPTS[index % len(PROMPTS)]} ({index})",
        width=work.size_px,
        height=work.size_px,
        steps=work.steps,
        guidance=work.guidance,
        seed=index,
    )
    request = gateway_pb2.GenerateRequest(params=params, inline_artifact=True)
    busy: dict[str, float] = {}
    error = "no terminal event"
    try:
        async for event in stub.Generate(request, timeout=work.timeout_s):
            if event.WhichOneof("event") == "status" and event.status.state == gateway_pb2.REQUEST_STATE_DONE:
                busy, error = dict(event.status.busy_s), ""
    except grpc.aio.AioRpcError as failure:
        error = f"{failure.code().name}: {failure.details()}"
    return Outcome(time.perf_counter() - planned_s, busy, error)


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
