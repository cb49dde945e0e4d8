"""A child process that the launcher starts, watches, restarts and stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightloom.with_parent import with_parent
from services.errors import StartupError

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 10.0
STARTUP_ERROR_CODE = 2
# A process that has never lived this long and dies this often will not live.
SOUND_LIFE_S = 30.0
MAX_FIRST_STARTS = 4


class Child:
    """One process: its command, its log file, and the task that starts it again when it dies. It ends with its parent.

    A child has a session of its own, so a Ctrl-C in the terminal reaches the launcher only, which stops the
    children in order.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.restarts = 0
        self._command = tuple(command)
        self._log = log
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._stopping = False
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int:
        """Of the running process; 0 between two lives."""
        return self._process.pid if self._process and self._process.returncode is None else 0

    async def start(self) -> None:
        """Starts the process and its watch."""
        await self._spawn()
        self._watch = asyncio.create_task(self._keep_alive(), name=f"watch {self.name}")

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after `grace_s` seconds."""
        self._stopping = True
        process = self._process
        if process and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), grace_s)
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._watch:
            self._watch.cancel()

    def last_error(self) -> str:
        """The last line of the log that is not blank."""
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "(nothing was logged)"

    async def _spawn(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *with_parent(self._command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )

    async def _keep_alive(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        sound = False
        while self._process:
            born_s = time.monotonic()
            code = await self._process.wait()
            if self._stopping:
                return
            sound = sound or time.monotonic() - born_s > SOUND_LIFE_S
            if code == STARTUP_ERROR_CODE or not sound and self.restarts + 1 >= MAX_FIRST_STARTS:
                self.failed.set_result(f"{self.name} cannot start: {self.last_error()}")
                return
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            self.restarts += 1
            await self._spawn()


async def first_failure(children: Sequence[Child]) -> None:
    """Waits until a child gives up.

    Raises:
        StartupError: always, with that child's reason.
    """
    done, _ = await asyncio.wait([child.failed for child in children], return_when=asyncio.FIRST_COMPLETED)
    raise StartupError(done.pop().result())
