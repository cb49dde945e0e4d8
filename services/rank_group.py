"""The front's side of its rank process: start, calls, watch, restart.

The group starts the rank over a socket pair, hands its frames to the calls they belong to, and starts it again, with
growing pauses, when it dies or stops answering. Calls that were open then end with DeviceLost.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from protos import types_pb2
from services.channel import AsyncChannel, Frame, Kind, pair
from services.config import StageConfig, environment_with_malloc
from services.errors import DeviceLost, ErrorRecord, NotReady, ServiceError, StartupError

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.25
MAX_BACKOFF_S = 10.0
CALL_QUEUE_FRAMES = 64
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


def _die_with_front() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(slots=True)
class RankCall:
    """One RPC on its way through the rank: replies come in `replies`, None ends them, an error may stand after it."""

    id: int
    replies: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(CALL_QUEUE_FRAMES))
    error: ServiceError | None = None
    over: bool = False

    def end(self, error: ServiceError | None) -> None:
        """Ends the replies; those that wait are still read first unless there is no room for the end."""
        if self.over:
            return
        self.over = True
        self.error = error
        while True:
            try:
                self.replies.put_nowait(None)
                return
            except asyncio.QueueFull:
                self.replies.get_nowait()


class RankGroup:
    """Owns the rank process. `describe` is what the rank said of itself, None while it is not ready."""

    def __init__(self, config: StageConfig, rank_module: str, on_change: Callable[[], None]) -> None:
        self._config = config
        self._module = rank_module
        self._on_change = on_change
        self._calls: dict[int, RankCall] = {}
        self._next_id = 0
        self._channel: AsyncChannel | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._heard_s = time.monotonic()
        self._was_ready = False
        self._stopping = False
        self.describe: types_pb2.DescribeResponse | None = None
        self.status: dict[str, float] = {}
        self.restarts = 0

    @property
    def pid(self) -> int:
        """Of the rank process; 0 while there is none."""
        return self._process.pid if self._process and self._process.returncode is None else 0

    async def run(self) -> None:
        """Keeps a rank alive until `stop`.

        Raises:
            StartupError: the first start failed in a way that another try would not mend.
        """
        backoff_s = FIRST_BACKOFF_S
        while not self._stopping:
            started_s = time.monotonic()
            reason = await self._live()
            if self._is_stopping():
                return
            if time.monotonic() - started_s > 60.0:
                backoff_s = FIRST_BACKOFF_S
            log.error("the rank ended (%s); starting it again in %.2f s", reason, backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            self.restarts += 1

    async def open(self, opening: dict[str, object]) -> RankCall:
        """Begins a call.

        Raises:
            NotReady: no rank is ready.
        """
        if self.describe is None or self._channel is None:
            raise NotReady("the replica is starting", retry_after_s=1.0)
        self._next_id += 1
        call = RankCall(self._next_id)
        self._calls[call.id] = call
        await self._channel.send(Frame(Kind.OPEN, call.id, json.dumps(opening).encode()))
        return call

    async def send(self, call: RankCall, kind: Kind, payload: bytes = b"") -> None:
        """Sends a frame of a call; waits while the rank does not read."""
        if self._channel is not None and not call.over:
            await self._channel.send(Frame(kind, call.id, payload))

    async def close(self, call: RankCall) -> None:
        """Forgets a call; the rank is told to cancel it when it has not ended."""
        self._calls.pop(call.id, None)
        if not call.over:
            call.over = True
            # Room for a reply that the reader may be waiting to hand over.
            while not call.replies.empty():
                call.replies.get_nowait()
            if self._channel is not None:
                await self._channel.send(Frame(Kind.CANCEL, call.id))

    async def shutdown(self) -> None:
        """Tells the rank that the replica is leaving."""
        if self._channel is not None:
            await self._channel.send(Frame(Kind.SHUTDOWN, 0))

    async def stop(self) -> None:
        """Ends the rank process."""
        self._stopping = True
        await self._kill()

    def _is_stopping(self) -> bool:
        return self._stopping

    async def _live(self) -> str:
        """One life of a rank; returns why it ended."""
        front_end, rank_end = pair()
        command = (
            sys.executable,
            "-m",
            self._module,
            "--channel-fd",
            str(rank_end.fileno()),
            "--config-json",
            json.dumps(_plain(self._config)),
        )
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(rank_end.fileno(),),
            env=environment_with_malloc(),
            preexec_fn=_die_with_front,  # noqa: PLW1509 - only a system call runs between fork and exec
        )
        rank_end.close()
        self._channel = await AsyncChannel.open(front_end)
        self._heard_s = time.monotonic()
        watchdog = asyncio.create_task(self._watch())
        try:
            reason = await self._read()
        finally:
            watchdog.cancel()
            self.describe = None
            self._channel.close()
            self._channel = None
            self._on_change()
            for call in list(self._calls.values()):
                call.end(DeviceLost("the rank process died while it worked on the request", retry_after_s=1.0))
            self._calls.clear()
            await self._kill()
        code = self._process.returncode
        return reason or f"exit code {code}"

    async def _read(self) -> str:
        assert self._channel is not None
        while frame := await self._channel.receive():
            self._heard_s = time.monotonic()
            match frame.kind:
                case Kind.REPLY:
                    if call := self._calls.get(frame.call):
                        await call.replies.put(frame.payload)
                case Kind.FINISH:
                    if call := self._calls.pop(frame.call, None):
                        await self._finish(call, None)
                case Kind.ERROR:
                    if call := self._calls.pop(frame.call, None):
                        await self._finish(call, ErrorRecord(**json.loads(frame.payload)).error())
                case Kind.STATUS:
                    self.status = json.loads(frame.payload)
                case Kind.READY:
                    self.describe = types_pb2.DescribeResponse.FromString(frame.payload)
                    self._was_ready = True
                    self._on_change()
                case Kind.FATAL:
                    fatal = json.loads(frame.payload)
                    if fatal["startup"] and not self._was_ready:
                        raise StartupError(fatal["message"])
                    return str(fatal["message"])
                case _:
                    return f"unexpected frame {frame.kind.name}"
        return ""

    async def _finish(self, call: RankCall, error: ServiceError | None) -> None:
        if not call.over:
            call.over = True
            call.error = error
            await call.replies.put(None)

    async def _watch(self) -> None:
        """Ends a rank that has not been heard of for too long."""
        service = self._config.service
        while True:
            limit_s = service.hang_timeout_s if self.describe is not None else service.start_timeout_s
            silent_s = time.monotonic() - self._heard_s
            if silent_s > limit_s:
                log.error("the rank has been silent for %.0f s: it is ended", silent_s)
                await self._kill()
                return
            await asyncio.sleep(min(1.0, limit_s / 4))

    async def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def _plain(config: StageConfig) -> dict[str, object]:
    return asdict(config)
