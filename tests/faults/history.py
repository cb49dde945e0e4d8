"""What clients, workers and the harness write down while faults happen: JSON lines, read by the checker afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Recorder:
    """Appends lines to a file, each in one write: a kill falls between lines. `t` is Unix seconds."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def write(self, kind: str, **fields: Any) -> None:
        """One line."""
        self._file.write(json.dumps({"t": time.time(), "kind": kind, **fields}).encode() + b"\n")


@dataclass(frozen=True, slots=True)
class History:
    """All that is known of a run.

    `clients`: invoke, ok, fail and info of calls, events and results as clients saw them. `faults`: what the harness
    did. `workers`: every call that a stage's rank began, and every step. `final`: `final_state.collect`.
    """

    clients: list[Line]
    faults: list[Line]
    workers: list[Line]
    final: Line

    @property
    def accepted(self) -> dict[str, Line]:
        """The `ok` of every submit, by request id."""
        return {line["id"]: line for line in self.clients if line["kind"] == "ok" and line["op"] == "submit"}

    def of_workers(self, kind: str) -> dict[str, list[Line]]:
        """Workers' lines of one kind by request id, oldest first."""
        found: dict[str, list[Line]] = {}
        for line in self.workers:
            if line["kind"] == kind:
                found.setdefault(line["id"], []).append(line)
        return found


def read_lines(paths: Iterable[Path]) -> list[Line]:
    """The lines of several files by time."""
    lines = [json.loads(text) for path in paths for text in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: float(line["t"]))
