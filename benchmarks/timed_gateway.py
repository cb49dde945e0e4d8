"""`python -m benchmarks.timed_gateway --config FILE`: the gateway, which notes how long it waits for its state.

Every call to Redis and every write to the artifact store becomes a line of FILE.calls: name, start (ns since 1970),
seconds. A script has its own name, another command is `command`, a write `latents` or `artifact`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from gateway import __main__ as gateway
from gateway.scripts import Scripts
from gateway.store import Store
from services.server import ensure_malloc, run_service

Method = Callable[..., Coroutine[Any, Any, Any]]


class Notes:
    """The file. A call inside another one belongs to that."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)
        self._inside: ContextVar[bool] = ContextVar("inside", default=False)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Notes what the block takes."""
        if self._inside.get():
            yield
            return
        token, start_ns, started_s = self._inside.set(True), time.time_ns(), time.perf_counter()
        try:
            yield
        finally:
            self._file.write(json.dumps([name, start_ns, time.perf_counter() - started_s]) + "\n")
            self._inside.reset(token)

    def around(self, method: Method, name: str = "") -> Method:
        """The method, timed; without a name, its first argument is the name."""

        async def timed(self_: Any, *arguments: Any, **options: Any) -> Any:
            with self.timed(name or arguments[0]):
                return await method(self_, *arguments, **options)

        return timed


def calls_file(config: Path) -> Path:
    """Where the gateway of that config notes its calls."""
    return config.with_suffix(".calls")


def note_calls(notes: Notes) -> None:
    """From now on."""
    for cls, method, name in (
        (Scripts, "run", ""),
        (Scripts, "call", "command"),
        (Store, "put", "artifact"),
        (Store, "put_latents", "latents"),
    ):
        setattr(cls, method, notes.around(getattr(cls, method), name))


if __name__ == "__main__":
    ensure_malloc()
    note_calls(Notes(calls_file(Path(sys.argv[sys.argv.index("--config") + 1]))))
    run_service(gateway.main)
