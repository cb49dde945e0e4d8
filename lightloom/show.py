"""What the commands print: processes, models and requests, a request's timeline, the feature matrix."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightloom.client import Endpoint
from protos import gateway_pb2, types_pb2
from services.errors import StartupError

BAR_CHARS = 48


def show_processes(processes: Sequence[dict[str, Any]]) -> None:
    """One row a process."""
    table = Table("process", "address", "pid", "restarts", box=None)
    for row in processes:
        table.add_row(row["name"], row["address"], str(row["pid"] or "-"), str(row["restarts"]))
    Console(stderr=True).print(table)


def show_status(endpoint: Endpoint, run_dir: Path, limit: int) -> None:
    """Processes of the run folder if a cluster runs there, models with replicas, newest requests."""
    from lightloom.launcher import ask

    # The processes of a remote cluster are not ours to see.
    with contextlib.suppress(StartupError):
        show_processes(ask(run_dir, {"command": "status"})["processes"])
    console = Console()
    with endpoint.open() as client:
        models, requests = client.models(), client.list(limit)
    table = Table("model", "family", "ready", "replicas", "running", box=None)
    for model in models:
        stages = [types_pb2.Stage.Name(replica.stage).removeprefix("STAGE_").lower() for replica in model.replicas]
        counts = ", ".join(f"{stage} {stages.count(stage)}" for stage in dict.fromkeys(stages))
        running = sum(replica.in_flight for replica in model.replicas)
        table.add_row(model.name, model.family, "yes" if model.ready else "no", counts, str(running))
    console.print(table)
    table = Table("request", "state", "step", "age", "prompt", box=None)
    for status in requests:
        name = gateway_pb2.RequestState.Name(status.state).removeprefix("REQUEST_STATE_").lower()
        age = f"{time.time() - status.created_unix_s:.0f} s"
        steps = f"{status.step}/{status.total_steps}"
        table.add_row(status.request_id, name, steps, age, status.params.prompt[:60])
    console.print(table)


def show_trace(request_id: str, endpoint: Endpoint) -> None:
    """Every span as a bar on the request's own time."""
    with endpoint.open() as client:
        spans = client.trace(request_id)
    if not spans:
        Console().print("nothing was recorded yet")
        return
    start = min(span.start_unix_ns for span in spans)
    total = max(max(span.start_unix_ns + span.duration_ns for span in spans) - start, 1)
    table = Table("process", "span", "start ms", "ms", "", box=None)
    for span in spans:
        before = round((span.start_unix_ns - start) / total * BAR_CHARS)
        length = max(1, round(span.duration_ns / total * BAR_CHARS))
        bar = " " * before + "█" * min(length, BAR_CHARS - before + 1)
        begin = f"{(span.start_unix_ns - start) / 1e6:.1f}"
        table.add_row(span.process, span.name, begin, f"{span.duration_ns / 1e6:.1f}", bar)
    Console().print(table)


def show_features() -> None:
    """The matrix as the code knows it, for this machine."""
    import torch

    from services.feature_set import matrix

    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = Table("family", "feature", "exact", f"on {device}", box=None)
    for cell in matrix(device):
        table.add_row(cell.family, cell.feature, "yes" if cell.exact else "no", cell.reason or "works")
    Console().print(table)
