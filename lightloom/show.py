"""What the commands print: processes, models and requests, a request's timeline, the feature matrix."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightloom.connection import Connection
from lightloom.control import ask
from lightloom.member import ProcessRow
from protos import gateway_pb2, types_pb2
from services.errors import InvalidRequest, UnknownRequest

if TYPE_CHECKING:
    from lightloom.client import Client

BAR_CHARS = 48
# Of a last column on a terminal that is too narrow.
MIN_CHARS = 8
COLUMN_GAP = 2
# A pipe has no width of its own, and what reads it wants whole values.
PIPE_CHARS = 400
PROMPT_CHARS = 60
# Of an id, which tell requests apart; how many a command takes at least, and how many there are.
ID_CHARS = 8
MIN_ID_CHARS = 6
WHOLE_ID_CHARS = 32
# As many as a gateway lists.
NEWEST = 1000
# Of those that an error names.
SHOWN_IDS = 4


def output() -> Console:
    """Standard output; as wide as it takes when nobody looks at it."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_CHARS)
    return console


def show_processes(console: Console, processes: Sequence[ProcessRow]) -> None:
    """One row a process."""
    table = Table(box=None, pad_edge=False)
    for title in ("process", "state", "address", "pid"):
        table.add_column(title, no_wrap=True)
    for title in ("restarts", "rank restarts", "ranks: pids"):
        table.add_column(title)
    for row in processes:
        counts = str(row["restarts"]), str(row["rank_restarts"])
        table.add_row(row["name"], row["state"], row["address"], str(row["pid"] or "-"), *counts, _ranks(row))
    console.print(table)


def _ranks(row: ProcessRow) -> str:
    """How many, in which layout, and their process ids."""
    if not row["ranks"]:
        return "-"
    count = f"{row['ranks']} ({row['layout']})" if row["layout"] else str(row["ranks"])
    return f"{count}: {', '.join(map(str, row['rank_pids']))}" if row["rank_pids"] else count


def show_status(connection: Connection, limit: int, *, as_json: bool) -> None:
    """Processes of the run folder if a cluster runs there, models with replicas, newest requests.

    Of a cluster that is still starting, the processes only.
    """
    cluster = connection.cluster()
    starting = cluster is not None and not connection.address and not cluster["ready"]
    models: Sequence[gateway_pb2.ModelInfo] = ()
    requests: Sequence[gateway_pb2.RequestStatus] = ()
    if not starting:
        with connection.open() as client:
            models, requests = client.models(), client.list(limit)
    processes: Sequence[ProcessRow] = cluster["processes"] if cluster else ()
    if as_json:
        _print_json(processes, models, requests, ready=not starting)
        return
    console = output()
    if processes:
        show_processes(console, processes)
    if starting:
        console.print("the cluster is still starting")
        return
    console.print(_models(models))
    console.print(_requests(console, requests))


def _print_json(
    processes: Sequence[ProcessRow],
    models: Sequence[gateway_pb2.ModelInfo],
    requests: Sequence[gateway_pb2.RequestStatus],
    *,
    ready: bool,
) -> None:
    """Models and requests are those of the REST API."""
    # Brings the REST front's libraries with it; the tables need none of them.
    from gateway.http_json import model_json, status_json

    report = {
        "ready": ready,
        "processes": processes,
        "models": [model_json(model) for model in models],
        "requests": [status_json(status) for status in requests],
    }
    print(json.dumps(report, indent=2))


def _models(models: Sequence[gateway_pb2.ModelInfo]) -> Table:
    table = Table("model", "family", "ready", "replicas", "running", box=None, pad_edge=False)
    for model in models:
        kinds = Counter((_stage(replica), replica.layout) for replica in model.replicas)
        counts = ", ".join(
            f"{stage} {count} ({layout})" if layout else f"{stage} {count}" for (stage, layout), count in kinds.items()
        )
        running = sum(replica.in_flight for replica in model.replicas)
        ready = "yes" if model.ready else ", ".join(["no", *(f"no {expert}" for expert in model.missing_experts)])
        table.add_row(model.name, model.family, ready, counts, str(running))
    return table


def _stage(replica: gateway_pb2.Replica) -> str:
    """As `lightloom scale` takes it."""
    stage = types_pb2.Stage.Name(replica.stage).removeprefix("STAGE_").lower()
    return f"{stage}.{replica.expert}" if replica.expert else stage


def _requests(console: Console, requests: Sequence[gateway_pb2.RequestStatus]) -> Table:
    rows = [
        (
            status.request_id,
            gateway_pb2.RequestState.Name(status.state).removeprefix("REQUEST_STATE_").lower(),
            f"{status.step}/{status.total_steps}",
            f"{time.time() - status.created_unix_s:.0f} s",
        )
        for status in requests
    ]
    titles = ("request", "state", "step", "age")
    chars = min(_room(console, titles, rows), PROMPT_CHARS)
    table = Table(*titles, "prompt", box=None, pad_edge=False)
    for row, status in zip(rows, requests, strict=True):
        prompt = " ".join(status.params.prompt.split())
        table.add_row(*row, Text(prompt if len(prompt) <= chars else prompt[: chars - 1] + "…", no_wrap=True))
    return table


def _room(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Characters that are left for one more column, so that no other is cut: ids and times are copied from here."""
    taken = sum(max(map(len, column)) + COLUMN_GAP for column in zip(titles, *rows, strict=True))
    return max(console.width - taken, MIN_CHARS)


def show_scaled(run_dir: Path, model: str, replicas: Mapping[str, int]) -> None:
    """Scales the cluster in the folder, and says what is not there yet.

    Raises:
        StartupError: no cluster runs there, or it has no such model.
    """
    answer = ask(run_dir, {"command": "scale", "model": model, "replicas": replicas})
    console = output()
    show_processes(console, answer["processes"])
    late = [row["name"] for row in answer["processes"] if row["state"] != "serving"]
    if late:
        console.print(f"starting: {', '.join(late)}; `lightloom status` shows when they serve")
    for stage in (stage for stage, count in replicas.items() if count == 0):
        # A model's limits are those of its denoiser: without one, nothing can be checked.
        fresh = "new ones are refused" if stage.startswith("dit") else "new ones too"
        console.print(f"no {stage} is left: accepted requests wait until there is one, {fresh}")


def show_trace(connection: Connection, request_ids: Sequence[str]) -> None:
    """Every span as a bar, on one time for all requests. Ids may be cut short, see `_whole_ids`."""
    with connection.open() as client:
        traces = [(request_id, client.trace(request_id)) for request_id in _whole_ids(client, request_ids)]
    console = output()
    found = [(request_id, span) for request_id, spans in traces for span in spans]
    if not found:
        console.print("nothing was recorded yet")
        return
    found.sort(key=lambda pair: pair[1].start_unix_ns)
    start = found[0][1].start_unix_ns
    total = max(max(span.start_unix_ns + span.duration_ns for _, span in found) - start, 1)
    # Whose it is goes without saying where there is one.
    shown = slice(0 if len(request_ids) > 1 else 1, None)
    titles = ("request", "process", "span", "start ms", "ms")[shown]
    rows = [
        (request_id[:ID_CHARS], span.process, span.name, *_ms(span.start_unix_ns - start, span.duration_ns))[shown]
        for request_id, span in found
    ]
    chars = min(_room(console, titles, rows) - 1, BAR_CHARS)
    table = Table(*titles, "", box=None, pad_edge=False)
    for row, (_, span) in zip(rows, found, strict=True):
        before = round((span.start_unix_ns - start) / total * chars)
        length = max(1, round(span.duration_ns / total * chars))
        table.add_row(*row, Text(" " * before + "█" * min(length, chars - before + 1), no_wrap=True))
    console.print(table)


def _whole_ids(client: Client, given: Sequence[str]) -> list[str]:
    """Ids of the newest requests by how they begin; whole ones are those of any request.

    Raises:
        InvalidRequest: a beginning of less than MIN_ID_CHARS characters, or of several requests.
        UnknownRequest: none of the newest requests begins so.
    """
    short = [start for start in given if len(start) < WHOLE_ID_CHARS]
    for start in short:
        if len(start) < MIN_ID_CHARS:
            raise InvalidRequest(
                f"request id {start!r} is too short: give {MIN_ID_CHARS} characters of it or more", param="request_id"
            )
    newest = [status.request_id for status in client.list(NEWEST)] if short else []
    return [_only(start, newest) if start in short else start for start in given]


def _only(start: str, newest: Sequence[str]) -> str:
    found = [request_id for request_id in newest if request_id.startswith(start)]
    if not found:
        raise UnknownRequest(f"none of the newest {len(newest)} requests has an id that begins with {start!r}")
    if len(found) > 1:
        more = f" and {len(found) - SHOWN_IDS} more" if len(found) > SHOWN_IDS else ""
        raise InvalidRequest(
            f"{len(found)} requests have ids that begin with {start!r}: {', '.join(found[:SHOWN_IDS])}{more}",
            param="request_id",
        )
    return found[0]


def _ms(*nanoseconds: int) -> list[str]:
    return [f"{duration / 1e6:.1f}" for duration in nanoseconds]


def show_features() -> None:
    """The matrix as the code knows it, for this machine."""
    import torch

    from services.feature_set import matrix

    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = Table("family", "feature", "exact", f"on {device}", box=None)
    for cell in matrix(device):
        table.add_row(cell.family, cell.feature, "yes" if cell.exact else "no", cell.reason or "works")
    output().print(table)
