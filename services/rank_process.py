"""The main of every rank process: threads for the channel, one main thread for all torch work.

`python -m services.rank_start X_svc.rank --channel-fd N --config-json JSON`, started by a front
(`services/rank_handle.py`), with `--rank`, `--world` and `--rendezvous` in a group of several. A stage brings a
`RankProgram` and calls `run(build)`; it never sees sockets, threads or frames. The ranks of a group handle the same
frames in lockstep; rank 0 answers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NoReturn, Protocol

import torch

from protos import types_pb2
from services.channel import (
    CALL_ROOM_BYTES,
    MAX_FRAME_BYTES,
    PROCESS,
    TAKEN,
    BlockingChannel,
    ChannelBroken,
    Fatal,
    Frame,
    FrameQueue,
    Kind,
    OpenCall,
    error_to_bytes,
)
from services.config import StageConfig, parse
from services.errors import ServiceError, StartupError
from services.failures import failure_of
from services.lockstep import Lockstep, join_group
from services.telemetry import request_context, setup
from services.tensor_wire import WHOLE_BYTES
from services.tensors import bundle_frames

INBOX_BYTES = 64 * 1024 * 1024
OUTBOX_BYTES = 16 * 1024 * 1024
STATUS_EVERY_S = 1.0
BEAT_EVERY_S = 1.0
STATUS_MIN_S = 0.25
MAX_TICK_FAILURES = 3
PR_SET_PDEATHSIG = 1
STARTUP_ERROR_CODE = 2

_log = logging.getLogger(__name__)


class Call:
    """One open call, as the program sees it.

    Attributes:
        cancelled: may turn True at any moment; sends are dropped then.
        has_room: whether its caller takes more now, equal on all ranks during a tick. What is sent all the same waits,
            and everything else of this process with it.
    """

    def __init__(self, call_id: int, opened: OpenCall, outbox: FrameQueue, *, speaks: bool = True) -> None:
        self.id = call_id
        self.method = opened.method
        self.request_id = opened.request_id
        self.traceparent = opened.traceparent
        self.deadline_unix_s = opened.deadline_unix_s
        self.cancelled = False
        self.closed = False
        self.has_room = True
        self._outbox = outbox
        self._sent_bytes = 0
        self._taken_bytes = 0
        self._sink_is_full: Callable[[], bool] | None = None
        # Rank 0 answers for the group; the others do the same work and say nothing.
        self._speaks = speaks

    def send(self, message_bytes: bytes) -> None:
        """Sends one serialised response message; waits while the writer is behind.

        Raises:
            ValueError: it is larger than a frame may be (8 MiB): split it.
        """
        if len(message_bytes) > MAX_FRAME_BYTES:
            raise ValueError(f"a response message has {len(message_bytes)} bytes: at most {MAX_FRAME_BYTES} fit")
        self._put(Kind.MESSAGE, message_bytes)

    def watch(self, is_full: Callable[[], bool] | None) -> None:
        """Makes what the call's results go into count for `has_room` too; asked before every tick. None ends it."""
        self._sink_is_full = is_full

    def is_full(self) -> bool:
        """Whether more would have to wait now, as rank 0 sees it."""
        if self.cancelled or self.closed:
            return False
        return self.is_behind() or (self._sink_is_full is not None and self._sink_is_full())

    def is_behind(self, room_bytes: int = CALL_ROOM_BYTES) -> bool:
        """Whether so much is on its way to the caller, as rank 0 sees it."""
        return self._sent_bytes - self._taken_bytes >= room_bytes

    def taken(self, num_bytes: int) -> None:
        """So much of what was sent has gone on to the caller."""
        self._taken_bytes += num_bytes

    def send_tensors(self, tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, str] | None = None) -> None:
        """Sends a bundle. The tensors may change once this returns."""
        if not self._speaks:
            return
        for message in bundle_frames(tensors, attributes, whole_bytes=WHOLE_BYTES):
            self._put(Kind.MESSAGE, message)

    def finish(self) -> None:
        """Ends the call well."""
        self._put(Kind.FINISH)
        self.closed = True

    def fail(self, error: ServiceError) -> None:
        """Ends the call with an error."""
        error.request_id = error.request_id or self.request_id
        self._put(Kind.ERROR, error_to_bytes(error))
        self.closed = True

    def _put(self, kind: Kind, payload: bytes = b"") -> None:
        if self._speaks and not self.cancelled and not self.closed:
            if kind is Kind.MESSAGE:
                self._sent_bytes += len(payload)
            self._outbox.put(Frame(kind, self.id, payload), dropped=lambda: self.cancelled)


class RankProgram(Protocol):
    """What a stage does with its calls. Every method runs on the main thread, in inference mode.

    A ServiceError that leaves `opened`, `message` or `half_closed` fails that call, anything else does too (as
    Internal); the program hears `cancelled` of it, so that it can forget the call. A call ends by `Call.finish` or
    `Call.fail`, or by `cancelled`.
    """

    def describe(self) -> types_pb2.DescribeResponse:
        """What the rank knows: stage, component, family, models, limits, features, device, dtype."""

    def opened(self, call: Call) -> None:
        """A call begins."""

    def message(self, call: Call, data: bytes) -> None:
        """A serialised request message of the call."""

    def half_closed(self, call: Call) -> None:
        """The caller has nothing more to say; it still listens."""

    def cancelled(self, call: Call) -> None:
        """The caller is gone: stop the work and free what it holds."""

    def tick(self) -> bool:
        """Does a piece of work; True when there is more to do at once."""

    def metrics(self) -> dict[str, float]:
        """Plain figures for Prometheus: `name` is a gauge, `name_total` a counter."""

    def drain(self) -> None:
        """The process is to end: bring open calls to an end soon (a checkpoint hands a request back)."""


def run(build: Callable[..., RankProgram]) -> NoReturn:
    """Reads the command line, builds the program, serves until the front ends it. Never returns.

    Args:
        build: gets the StageConfig, and in a group of several ranks the Mesh.
    """
    # What has been imported stays: no collection has to look through it. The process began without any.
    gc.freeze()
    gc.enable()
    parser = argparse.ArgumentParser()
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--config-json", required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--rendezvous", default="")
    arguments = parser.parse_args()
    os.set_inheritable(arguments.channel_fd, False)
    die_with_front()
    config = parse(StageConfig, json.loads(arguments.config_json))
    setup(f"{config.service.name or config.model.name}.rank{arguments.rank}")
    rank = Rank(BlockingChannel(socket.socket(fileno=arguments.channel_fd)), arguments.rank, arguments.world)
    sys.exit(rank.serve(build, config, arguments.rendezvous))


def die_with_front() -> None:
    """The kernel kills this process when the front ends, however that happens; the front alone hears signals."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Rank:
    """Calls, inbox and outbox of a rank process, and its main loop."""

    def __init__(self, channel: BlockingChannel, rank: int = 0, world: int = 1) -> None:
        self._channel = channel
        self._rank, self._world = rank, world
        self._inbox = FrameQueue(INBOX_BYTES)
        self._outbox = FrameQueue(OUTBOX_BYTES)
        self._calls: dict[int, Call] = {}
        self._draining = False
        self._tick_failures = 0
        self._status: dict[str, float] | None = None
        self._status_s = 0.0
        self._status_calls = 0
        self._writer = threading.Thread(target=self._write, name="channel writer", daemon=True)
        self._writer.start()
        threading.Thread(target=self._read, name="channel reader", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def serve(self, build: Callable[..., RankProgram], config: StageConfig, rendezvous: str = "") -> int:
        """Builds the program and runs it to its end; returns the exit code."""
        try:
            if config.model.threads:
                torch.set_num_threads(config.model.threads)
            with torch.inference_mode():
                mesh = join_group(config, self._rank, self._world, rendezvous)
                lockstep = Lockstep(self._rank, self._world)
                program = build(config) if mesh is None else build(config, mesh)
                # What has been loaded stays: no collection has to look through it again.
                gc.collect()
                gc.freeze()
                self._outbox.put(Frame(Kind.READY, PROCESS, program.describe().SerializeToString()))
                self._loop(program, lockstep)
        except StartupError as error:
            return self._end(Fatal(startup=True, message=str(error)), STARTUP_ERROR_CODE)
        except Exception as error:  # noqa: BLE001 - logged, told to the front, and the process ends
            _log.exception("the rank process ends")
            return self._end(Fatal(startup=False, message=f"{type(error).__name__}: {error}"[:2000]), 1)
        return self._end(None, 0)

    def _loop(self, program: RankProgram, lockstep: Lockstep) -> None:
        busy = False
        while not (self._draining and not self._calls and not busy):
            fresh = self._status_s + STATUS_MIN_S > time.monotonic()
            timeout_s = 0 if busy else STATUS_MIN_S if fresh else STATUS_EVERY_S
            frames, full = lockstep.take(self._inbox, timeout_s, self._full)
            for call in self._calls.values():
                call.has_room = call.id not in full
            for frame in frames:
                self._handle(program, frame)
                # A program may work on what it is told at once.
                self._report(program)
            busy = self._tick(program)
            self._calls = {key: call for key, call in self._calls.items() if not call.closed}
            self._report(program)

    def _full(self) -> list[int]:
        return [call.id for call in self._calls.values() if call.is_full()]

    def _handle(self, program: RankProgram, frame: Frame) -> None:
        if frame.kind is Kind.SHUTDOWN:
            self._draining = True
            program.drain()
            return
        if frame.kind is Kind.OPEN:
            self._calls[frame.call_id] = Call(
                frame.call_id, OpenCall.from_bytes(frame.payload), self._outbox, speaks=not self._rank
            )
        call = self._calls.get(frame.call_id)
        if call is None or call.closed:
            return
        if frame.kind is Kind.CANCEL:
            call.cancelled = True
            self._drop(program, call)
            return
        with request_context(call.request_id, call.traceparent):
            try:
                if frame.kind is Kind.OPEN:
                    program.opened(call)
                elif frame.kind is Kind.MESSAGE:
                    program.message(call, frame.payload)
                elif frame.kind is Kind.HALF_CLOSE:
                    program.half_closed(call)
            except Exception as error:  # noqa: BLE001 - one call fails, the others go on
                call.fail(self._service_error(error, call.request_id))
                self._drop(program, call)

    def _tick(self, program: RankProgram) -> bool:
        try:
            busy = program.tick()
        except Exception as error:
            # The program should have failed its own calls; whose fault it was is unknown here, so all of them fail.
            self._tick_failures += 1
            failure = self._service_error(error, "")
            if self._tick_failures >= MAX_TICK_FAILURES:
                raise
            for call in list(self._calls.values()):
                call.fail(failure)
                self._drop(program, call)
            return True
        self._tick_failures = 0
        return busy

    def _drop(self, program: RankProgram, call: Call) -> None:
        self._calls.pop(call.id, None)
        try:
            program.cancelled(call)
        except Exception as error:  # noqa: BLE001 - the call is over; nobody waits for the answer
            self._service_error(error, call.request_id)

    def _service_error(self, error: Exception, request_id: str) -> ServiceError:
        """What a caller may know of it; on one rank of several, what the others do not share ends the process."""
        if self._world > 1 and not isinstance(error, ServiceError):
            # The others go on or wait in a collective: only a new group is in step again.
            raise error
        return failure_of(error, request_id)

    def _report(self, program: RankProgram) -> None:
        now_s = time.monotonic()
        # What a call held is gone with it: that is told at once, the rest in passing.
        same_calls = len(self._calls) == self._status_calls
        if self._rank or same_calls and now_s - self._status_s < STATUS_MIN_S:
            return
        metrics = program.metrics()
        if metrics != self._status or now_s - self._status_s >= STATUS_EVERY_S:
            self._status, self._status_s, self._status_calls = metrics, now_s, len(self._calls)
            self._outbox.put(Frame(Kind.STATUS, PROCESS, json.dumps(metrics).encode()))

    def _end(self, fatal: Fatal | None, code: int) -> int:
        if fatal is not None:
            self._outbox.put(Frame(Kind.FATAL, PROCESS, fatal.to_bytes()))
        self._outbox.close()
        self._writer.join()
        return code

    def _read(self) -> None:
        try:
            while (frame := self._channel.receive()) is not None:
                call = self._calls.get(frame.call_id)
                if frame.kind is Kind.TAKEN:
                    # Only for rank 0, so it is none of the frames that all ranks handle.
                    if call is not None:
                        call.taken(TAKEN.unpack(frame.payload)[0])
                    continue
                if frame.kind is Kind.CANCEL and call is not None:
                    # Seen at once, also by a tick in progress and by a send that waits.
                    call.cancelled = True
                self._inbox.put(frame)
        except ChannelBroken:
            _log.exception("the front sent something that is no frame")
        # The front is gone: the main thread may be inside a kernel for long, so the process ends here.
        os._exit(1)

    def _beat(self) -> None:
        """Shows that the process runs, whatever its main thread does: one that is frozen is found soon."""
        while not self._outbox.closed:
            time.sleep(BEAT_EVERY_S)
            self._outbox.put(Frame(Kind.BEAT, PROCESS, b""))

    def _write(self) -> None:
        try:
            while frames := self._outbox.take(None):
                self._channel.send(frames)
        except OSError:
            os._exit(1)
