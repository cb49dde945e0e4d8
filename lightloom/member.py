"""One process of a cluster as its user sees it: where it listens, whether it serves, how often it was started again."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from dataclasses import dataclass
from typing import TypedDict

import psutil

from lightloom.child import Child
from lightloom.ports import listens, reachable
from services.parallel.degrees import Degrees

LOOK_TIMEOUT_S = 2.0
_FIGURE = re.compile(rb"^lightloom_(ready|rank_restarts_total) ([0-9.]+)$", re.MULTILINE)


class ProcessRow(TypedDict):
    """What `lightloom status` shows of a process.

    `state` is "starting", "serving" or "down"; `pid` is 0 while it is down. `restarts` counts the process's own,
    `rank_restarts` those of its ranks (since it was started itself). `ranks` is how many it has by its config, and
    `layout` how they share the work, in words; a gateway and Redis have none. `rank_pids` are those on this machine, in
    their order, where they are asked for (`find_ranks`).
    """

    name: str
    address: str
    pid: int
    state: str
    restarts: int
    rank_restarts: int
    ranks: int
    layout: str
    rank_pids: list[int]


@dataclass(slots=True)
class Member:
    """A stage replica or a gateway.

    Args:
        address: host:port of its gRPC front.
        host, http_port: of its page: metrics of a stage, REST of a gateway.
        secure: how to speak TLS to the page; None: plain text.
        degrees: of its ranks; None for a process that has none.
    """

    child: Child
    address: str
    host: str
    http_port: int
    page: str = "/metrics"
    secure: ssl.SSLContext | None = None
    degrees: Degrees | None = None
    serving: bool = False
    rank_restarts: int = 0

    async def look(self) -> bytes:
        """Reads the page: whether the process serves now. Returns the page, empty when it has none."""
        status, body = 0, b""
        # Another cluster's process may have the port; it is not to be taken for ours.
        if self.child.pid and listens(self.child.pid, self.http_port):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_TIMEOUT_S):
                    status, body = await http_get(reachable(self.host), self.http_port, self.page, self.secure)
        figures = {name: float(value) for name, value in _FIGURE.findall(body)}
        self.serving = bool(figures[b"ready"]) if b"ready" in figures else status != 0
        self.rank_restarts = int(figures.get(b"rank_restarts_total", self.rank_restarts))
        return body

    def row(self) -> ProcessRow:
        """As the last look found it."""
        pid = self.child.pid
        return ProcessRow(
            name=self.child.name,
            address=self.address,
            pid=pid,
            state="down" if not pid else "serving" if self.serving else "starting",
            restarts=self.child.restarts,
            rank_restarts=self.rank_restarts,
            ranks=self.degrees.world if self.degrees else 0,
            layout=self.degrees.words if self.degrees else "",
            rank_pids=[],
        )


def find_ranks(front: int) -> list[int]:
    """Process ids of a front's ranks on this machine, in the order of the ranks. All processes are looked through."""
    found = {}
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(front).children():
            with contextlib.suppress(psutil.Error):
                command = child.cmdline()
                if "--rank" in command:
                    found[int(command[command.index("--rank") + 1])] = child.pid
    return [found[rank] for rank in sorted(found)]


async def http_get(host: str, port: int, path: str, secure: ssl.SSLContext | None = None) -> tuple[int, bytes]:
    """Status and body; (0, b"") while nothing listens."""
    try:
        reader, writer = await asyncio.open_connection(host, port, ssl=secure)
    except OSError:
        return 0, b""
    writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
    try:
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    except OSError:
        return 0, b""
    finally:
        writer.close()
    return (int(head.split()[1]) if head else 0), body
