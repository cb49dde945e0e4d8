"""The front's side of its rank processes: start them, relay calls, watch them, start them again.

`RankLife` is a group of ranks from spawn to death with the calls it has; `RankGroup` keeps one alive. What comes in
goes to every rank, rank 0 answers for all. A life ends when any of its processes or channels does, or when rank 0 has
been silent for too long, as it is when another rank hangs; its open calls then fail with DeviceLost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from protos import types_pb2
from services.channel import CALL_ROOM_BYTES, Fatal, Frame, Kind, OpenCall, error_from_bytes, taken_to_bytes
from services.config import StageConfig
from services.errors import Cancelled, DeviceLost, NotReady, ServiceError, StartupError
from services.free_port import free_port
from services.parallel.degrees import Degrees
from services.rank_handle import LocalRank, Place, Rank, RemoteRank

FIRST_BACKOFF_S = 0.25
MAX_BACKOFF_S = 15.0
# A life at least this long starts the backoff anew.
SOUND_LIFE_S = 60.0
MAX_FIRST_STARTS = 3
EXIT_GRACE_S = 5.0
WATCH_EVERY_S = 0.25

# A call with CALL_ROOM_BYTES that wait for its caller is full: its rank is to send no more, and it ends when the caller
# takes nothing for STALL_LIMIT_S. What a rank sends all the same waits here too; with more of that the whole channel
# stands still, and all calls with it.
CALL_QUEUE_BYTES = 4 * CALL_ROOM_BYTES
STALL_LIMIT_S = 20.0
# The rank hears of what was taken once it is so much: not of every small message.
TELL_EVERY_BYTES = 1024 * 1024

# Every rank process beats once a second from a thread of its own.
FROZEN_S = 10.0

_log = logging.getLogger(__name__)


class RankCall:
    """The front's end of one call to the rank."""

    def __init__(self, call_id: int, life: RankLife) -> None:
        self.id = call_id
        self.full_since_s = 0.0
        self._life = life
        self._messages: deque[bytes] = deque()
        self._bytes = 0
        self._taken_bytes = 0
        self._changed = asyncio.Event()
        self._ended = False
        self._error: ServiceError | None = None

    async def send(self, message: bytes) -> None:
        """Passes a request message on; waits while the rank is behind."""
        if not self._ended:
            self._life.send(Kind.MESSAGE, self.id, message)
            await self._life.drained()

    def half_close(self) -> None:
        """The caller has nothing more to say."""
        if not self._ended:
            self._life.send(Kind.HALF_CLOSE, self.id)

    async def receive(self) -> bytes | None:
        """The next response message; None at the end.

        Raises:
            ServiceError: the call failed.
        """
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        message = self._messages.popleft()
        self._took(len(message))
        return message

    @property
    def overflows(self) -> bool:
        """Whether more waits for the caller than may be kept."""
        return self._bytes > CALL_QUEUE_BYTES

    def _took(self, num_bytes: int) -> None:
        overflowed = self.overflows
        self._bytes -= num_bytes
        self._taken_bytes += num_bytes
        if self.full_since_s:
            self.full_since_s = time.monotonic() if self._bytes >= CALL_ROOM_BYTES else 0.0
        if self._taken_bytes >= TELL_EVERY_BYTES and not self._ended:
            self._life.taken(self.id, self._taken_bytes)
            self._taken_bytes = 0
        if overflowed and not self.overflows:
            self._life.relieved()

    def cancel(self, error: ServiceError) -> None:
        """Ends the call from this side: the rank is told to stop, and `receive` raises the error."""
        if not self._ended:
            self._life.send(Kind.CANCEL, self.id)
            self.end(error)

    def close(self) -> None:
        """The caller is gone or has all it wanted; a rank that still works on the call is told to stop."""
        self.cancel(Cancelled("the call was closed"))
        self._messages.clear()

    def deliver(self, message: bytes) -> None:
        """A message from the rank."""
        self._messages.append(message)
        self._bytes += len(message)
        if self._bytes >= CALL_ROOM_BYTES and not self.full_since_s:
            self.full_since_s = time.monotonic()
        self._changed.set()

    def end(self, error: ServiceError | None) -> None:
        """The call is over, well or with an error; messages that wait are still received."""
        if self._ended:
            return
        self._ended = True
        self._error = error
        self.full_since_s = 0.0
        self._life.forget(self)
        self._changed.set()


@dataclass(frozen=True, slots=True)
class Death:
    """Why a life ended.

    `startup`: config or weights are at fault, so another start would end the same way. `away`: another host of the
    group does not answer, and may come up later than this one.
    """

    message: str
    startup: bool = False
    away: bool = False


class RankLife:
    """One group of rank processes and its calls. `start` makes them."""

    def __init__(self, config: StageConfig, on_ready: Callable[[], None]) -> None:
        self._config = config
        self._on_ready = on_ready
        self._ranks: list[Rank] = []
        self._waiting: set[int] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="lightloom-ranks-")
        self._calls: dict[int, RankCall] = {}
        self._next_id = 1
        self._heard_s = time.monotonic()
        self._longest_silence_s = 0.0
        self._over = asyncio.Event()
        self._first_closed: Rank | None = None
        self._alive_s: dict[int, float] = {}
        self._reason = ""
        self._fatal: Fatal | None = None
        self._away = False
        self.description: types_pb2.DescribeResponse | None = None
        self.metrics: dict[str, float] = {}

    async def start(self, rank_module: str) -> None:
        """Spawns the processes: an equal share on this host and on every other."""
        parallel = self._config.parallel
        world = Degrees.of(parallel).world
        rendezvous = f"file://{Path(self._folder.name) / 'rendezvous'}"
        if parallel.hosts:
            rendezvous = f"tcp://{parallel.leader_address}:{_rendezvous_port(parallel.leader_address)}"
        share = world // (len(parallel.hosts) + 1)
        self._waiting = set(range(world))
        for rank in range(world):
            place = Place(rank, world, rendezvous)
            heard = partial(self._on_frame, rank)
            if rank < share:
                spawned: Rank = await LocalRank.spawn(
                    self._config, rank_module, place, heard, partial(self._closed, rank)
                )
            else:
                agent = parallel.hosts[rank // share - 1]
                try:
                    spawned = await RemoteRank.spawn(self._config, agent, place, heard, partial(self._closed, rank))
                except OSError as error:
                    self._away = True
                    self.kill(f"the agent at {agent} does not answer: {error.strerror or 'in time'}")
                    return
            self._ranks.append(spawned)

    def send(self, kind: Kind, call_id: int = 0, payload: bytes = b"") -> None:
        """A frame to every rank."""
        for rank in self._ranks:
            rank.channel.send(kind, call_id, payload)

    def taken(self, call_id: int, num_bytes: int) -> None:
        """Tells the rank that answers what a caller has taken."""
        self._ranks[0].channel.send(Kind.TAKEN, call_id, taken_to_bytes(num_bytes))

    async def drained(self) -> None:
        """Waits until every rank has room again."""
        for rank in self._ranks:
            await rank.channel.drained()

    @property
    def ready(self) -> bool:
        """Whether it takes calls."""
        return not self._waiting and self.description is not None and not self._over.is_set()

    def open(self, opened: OpenCall) -> RankCall:
        """Begins a call."""
        call = RankCall(self._next_id, self)
        self._next_id += 1
        self._calls[call.id] = call
        self.send(Kind.OPEN, call.id, opened.to_bytes())
        return call

    async def watch(self) -> Death:
        """Waits for the end of this life, brings it about when a rank hangs, and clears up after it."""
        while not self._over.is_set() and not any(rank.gone for rank in self._ranks):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), WATCH_EVERY_S)
            self._check_silence()
            self._check_frozen()
            self._check_stalls()
        # A rank that ends by itself still has something to say; the others wait for it in vain.
        gone = next((rank for rank in self._ranks if rank.gone), self._ranks[0])
        first = self._first_closed or gone
        first.channel.read_rest()
        ending = await first.end(0.0 if self._reason else EXIT_GRACE_S)
        for rank in self._ranks:
            if rank is not first:
                rank.kill()
                rank.channel.read_rest()
                await rank.end(0.0)
        self._folder.cleanup()
        return self._died(first.place.rank, ending)

    def forget(self, call: RankCall) -> None:
        """Called by a call that is over."""
        self._calls.pop(call.id, None)
        self.relieved()

    def relieved(self) -> None:
        """Called when a queue that had too much has less."""
        channel = self._ranks[0].channel
        if channel.paused and not any(call.overflows for call in self._calls.values()):
            # The rank could not be heard while the channel stood still.
            self._heard_s = time.monotonic()
            self._alive_s.clear()
            channel.resume()

    def kill(self, reason: str) -> None:
        """Ends the processes at once; `watch` does the rest."""
        self._reason = self._reason or reason
        for rank in self._ranks:
            rank.kill()
        self._over.set()

    def _closed(self, rank: int) -> None:
        if not self._over.is_set() and rank < len(self._ranks):
            self._first_closed = self._ranks[rank]
        self._over.set()

    def _died(self, rank: int, ending: str) -> Death:
        which = "the rank process" if len(self._ranks) == 1 else f"rank {rank} of {len(self._ranks)}"
        message = self._reason or (self._fatal.message if self._fatal else f"{which} died ({ending})")
        for call in list(self._calls.values()):
            call.end(DeviceLost("the rank process died with the request in work; it can run again", retry_after_s=1.0))
        return Death(message, startup=self._fatal is not None and self._fatal.startup, away=self._away)

    def _on_frame(self, rank: int, frame: Frame) -> None:
        self._alive_s[rank] = time.monotonic()
        if frame.kind is Kind.FATAL:
            self._fatal = self._fatal or Fatal.from_bytes(frame.payload)
        elif frame.kind is Kind.READY:
            self._rank_ready(rank, frame.payload)
        if rank or frame.kind is Kind.BEAT:
            return
        if not self._waiting:
            self._longest_silence_s = max(self._longest_silence_s, time.monotonic() - self._heard_s)
        self._heard_s = time.monotonic()
        call = self._calls.get(frame.call_id)
        if frame.kind is Kind.MESSAGE and call:
            call.deliver(frame.payload)
            if call.overflows:
                self._ranks[0].channel.pause()
        elif frame.kind is Kind.FINISH and call:
            call.end(None)
        elif frame.kind is Kind.ERROR and call:
            call.end(error_from_bytes(frame.payload))
        elif frame.kind is Kind.STATUS:
            self.metrics = json.loads(frame.payload)

    def _rank_ready(self, rank: int, description: bytes) -> None:
        self._waiting.discard(rank)
        if not rank:
            self.description = types_pb2.DescribeResponse.FromString(description)
        if self.ready:
            self._heard_s = time.monotonic()
            self._on_ready()

    def _check_silence(self) -> None:
        service = self._config.service
        # A step may take long, but not much longer than any before it.
        hang_s = max(service.hang_timeout_s, 3 * self._longest_silence_s)
        limit_s = service.start_timeout_s if self._waiting else hang_s
        if not self._ranks[0].channel.paused and time.monotonic() - self._heard_s > limit_s:
            what = "was not ready" if self._waiting else "was silent"
            self.kill(f"the rank {what} for {limit_s:.0f} s and was killed")

    def _check_frozen(self) -> None:
        """A process that does not even beat is stopped, or its host is gone."""
        if self._waiting or self._ranks[0].channel.paused:
            return
        now_s = time.monotonic()
        for rank in self._ranks:
            if now_s - self._alive_s.get(rank.place.rank, now_s) > FROZEN_S:
                self.kill(f"rank {rank.place.rank} was frozen for {FROZEN_S:.0f} s and was killed")

    def _check_stalls(self) -> None:
        now_s = time.monotonic()
        for call in list(self._calls.values()):
            if call.full_since_s and now_s - call.full_since_s > STALL_LIMIT_S:
                call.cancel(Cancelled(f"the caller did not read its stream for {STALL_LIMIT_S:.0f} s"))


class RankGroup:
    """Keeps a rank alive.

    Args:
        changed: called whenever `ready` may have changed.
    """

    def __init__(self, config: StageConfig, rank_module: str, changed: Callable[[], None]) -> None:
        self._config = config
        self._module = rank_module
        self._changed = changed
        self._life: RankLife | None = None
        self._was_ready = False
        self._stopping = asyncio.Event()
        self.restarts = 0

    @property
    def description(self) -> types_pb2.DescribeResponse | None:
        """What the rank said of itself; None while no rank is ready."""
        return self._life.description if self._life and self._life.ready else None

    @property
    def metrics(self) -> dict[str, float]:
        """The rank's latest figures."""
        return self._life.metrics if self._life else {}

    async def supervise(self) -> None:
        """Runs one life after the other until `stop`.

        Raises:
            StartupError: the first start shows that config or weights are at fault, or fails three times, or another
                host does not answer within the time for a start.
        """
        backoff_s, starts, first_s = FIRST_BACKOFF_S, 0, time.monotonic()
        while not self._stopping.is_set():
            born_s = time.monotonic()
            self._life = RankLife(self._config, self._ready)
            await self._life.start(self._module)
            death = await self._life.watch()
            self._changed()
            starts += not death.away
            if self._stopping.is_set():
                return
            late = time.monotonic() - first_s > self._config.service.start_timeout_s
            if not self._was_ready and (death.startup or starts >= MAX_FIRST_STARTS or death.away and late):
                raise StartupError(death.message)
            backoff_s = FIRST_BACKOFF_S if time.monotonic() - born_s > SOUND_LIFE_S else backoff_s
            _log.error("rank lost: %s", death.message, extra={"restart_in_s": backoff_s})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            self.restarts += 1

    def open(self, opened: OpenCall) -> RankCall:
        """Begins a call.

        Raises:
            NotReady: no rank is ready.
        """
        if self._life is None or not self._life.ready:
            raise NotReady("the replica is starting", retry_after_s=1.0)
        return self._life.open(opened)

    def drain(self) -> None:
        """Tells the rank to bring its calls to an end and leave; it is not started again."""
        self._stopping.set()
        if self._life is not None and self._life.ready:
            self._life.send(Kind.SHUTDOWN)

    def stop(self) -> None:
        """Ends the rank now; `supervise` returns soon after."""
        self._stopping.set()
        if self._life is not None:
            self._life.kill("the replica stops")

    def _ready(self) -> None:
        self._was_ready = True
        self._changed()


def _rendezvous_port(host: str) -> int:
    try:
        return free_port(host)
    except OSError as error:
        raise StartupError(f"parallel.leader_address {host} is no address of this host") from error
