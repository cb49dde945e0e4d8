"""The control socket of a run folder: how `lightloom status` and `scale` talk to the `lightloom up` that runs there."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from services.errors import StartupError

Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class ControlServer:
    """Answers one JSON object a connection. `answer` gets a question and makes what `ask` returns."""

    def __init__(self, run_dir: Path, answer: Answer) -> None:
        self._run_dir = run_dir
        self._answer = answer
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Takes the folder.

        Raises:
            StartupError: another cluster runs in it.
        """
        path = control_path(self._run_dir)
        if path.exists():
            try:
                _, writer = await asyncio.open_unix_connection(path)
            except ConnectionRefusedError:
                path.unlink()
            else:
                writer.close()
                raise StartupError(f"a cluster already runs in {self._run_dir}: stop it, or choose another --run-dir")
        self._server = await asyncio.start_unix_server(self._serve, path)

    def close(self) -> None:
        """Gives the folder back, if it was taken."""
        if self._server:
            self._server.close()
            control_path(self._run_dir).unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        if line:
            answer = await self._answer(json.loads(line))
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()


def control_path(run_dir: Path) -> Path:
    """The control socket of a run folder."""
    return run_dir / "control.sock"


def ask(run_dir: Path, request: dict[str, Any]) -> dict[str, Any]:
    """One question to the cluster that runs in a folder.

    Raises:
        StartupError: none runs there, or it refused.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(control_path(run_dir)))
        except ConnectionRefusedError as error:
            # Who stops in order takes the socket away.
            raise StartupError(f"the cluster in {run_dir} was killed: start it again with `lightloom up`") from error
        except OSError as error:
            raise StartupError(
                f"no cluster runs in {run_dir}: start one with `lightloom up`, or name its --run-dir"
            ) from error
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as stream:
            line = stream.readline()
    if not line:
        raise StartupError(f"the cluster in {run_dir} ended before it answered")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise StartupError(answer["error"])
    return answer
