"""One rank process as its front holds it: spawned, with the front's end of its channel, ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from services.channel import AsyncChannel, Frame
from services.config import StageConfig, environment_with_malloc

SOCKET_BUFFER_BYTES = 4 * 1024 * 1024

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """A process's place in its group.

    Attributes:
        rank, world: number of the rank, and how many there are.
        rendezvous: where the ranks find each other, as torch.distributed takes it.
    """

    rank: int
    world: int
    rendezvous: str


class RankHandle:
    """A running rank process."""

    def __init__(self, process: asyncio.subprocess.Process, channel: AsyncChannel, place: Place) -> None:
        self._process = process
        self.channel = channel
        self.place = place
        self.exited: asyncio.Task[int] = asyncio.create_task(process.wait())

    @classmethod
    async def spawn(
        cls,
        config: StageConfig,
        module: str,
        place: Place,
        on_frame: Callable[[Frame], None],
        on_closed: Callable[[], None],
    ) -> RankHandle:
        """Starts `python -m module` at its place."""
        ours, theirs = _socket_pair()
        channel = AsyncChannel(ours, on_frame, on_closed)
        arguments = {
            "channel-fd": theirs.fileno(),
            "config-json": json.dumps(asdict(config)),
            "rank": place.rank,
            "world": place.world,
            "rendezvous": place.rendezvous,
        }
        words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, *words),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=environment_with_malloc(),
            )
        _log.info("rank started", extra={"pid": process.pid, "rank": place.rank})
        return cls(process, channel, place)

    def kill(self) -> None:
        """Ends the process at once."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def end(self, grace_s: float) -> int:
        """Waits for the end, brings it about after `grace_s`, and returns the exit code (negative: a signal)."""
        try:
            await asyncio.wait_for(asyncio.shield(self.exited), grace_s)
        except TimeoutError:
            self.kill()
        return await self.exited


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """Ends with buffers for a few chunks (as far as the kernel lets us)."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    return ends
