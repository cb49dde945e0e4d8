"""The main loop of a rank: the process that owns the device.

A reader thread takes frames from the front, a writer thread sends what the program makes, and the main thread does all
the work between them, so torch is used by one thread only. A stage's rank is a `RankProgram`: it is told of calls and
their messages, and ticks while it has work.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Protocol

import torch

from protos import types_pb2
from services import telemetry
from services.channel import BlockingChannel, Frame, Kind
from services.config import StageConfig, parse
from services.errors import ErrorRecord, Internal, ServiceError, StartupError
from services.tensors import bundle_frames

log = logging.getLogger(__name__)

INBOX_FRAMES = 256
OUTBOX_FRAMES = 64
STATUS_PERIOD_S = 1.0


class Call:
    """One RPC as the rank sees it. Its methods may be used by the main thread only."""

    def __init__(self, call_id: int, opening: Mapping[str, str], outbox: queue.Queue[Frame | None]) -> None:
        self.id = call_id
        self.method = opening["method"]
        self.request_id = opening.get("request_id", "")
        self.traceparent = opening.get("traceparent", "")
        self.cancelled = False
        self.ended = False
        self._outbox = outbox

    def send(self, message: bytes) -> None:
        """Sends one serialised response; waits while the front does not take it. Dropped once the call has ended."""
        if not (self.cancelled or self.ended):
            self._outbox.put(Frame(Kind.REPLY, self.id, message))

    def send_tensors(self, tensors: Mapping[str, torch.Tensor], attributes: Mapping[str, str] | None = None) -> None:
        """Sends a bundle."""
        for message in bundle_frames(tensors, attributes):
            self.send(message)

    def finish(self) -> None:
        """Ends the call with OK."""
        self._end(Frame(Kind.FINISH, self.id))

    def fail(self, error: ServiceError) -> None:
        """Ends the call with an error."""
        record = asdict(ErrorRecord.of(error)) | {"request_id": self.request_id}
        self._end(Frame(Kind.ERROR, self.id, json.dumps(record).encode()))

    def _end(self, frame: Frame) -> None:
        if not self.ended:
            self.ended = True
            self._outbox.put(frame)


class RankProgram(Protocol):
    """What a stage does with its calls. An error raised for a call fails that call alone."""

    def describe(self) -> types_pb2.DescribeResponse:
        """What this replica is; sent once, when it is ready."""

    def opened(self, call: Call) -> None:
        """A call began."""

    def message(self, call: Call, data: bytes) -> None:
        """A serialised request message came."""

    def half_closed(self, call: Call) -> None:
        """The client sends no more."""

    def cancelled(self, call: Call) -> None:
        """The call is over for the client: free what it holds."""

    def tick(self) -> bool:
        """Does one piece of work; returns whether more is waiting."""

    def metrics(self) -> dict[str, float]:
        """Numbers for the front's metrics page."""

    def drain(self) -> None:
        """The replica is leaving: hand back what can be handed back."""


class RankLoop:
    """Frames in, program, frames out."""

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel
        self._inbox: queue.Queue[Frame | None] = queue.Queue(INBOX_FRAMES)
        self._outbox: queue.Queue[Frame | None] = queue.Queue(OUTBOX_FRAMES)
        self._calls: dict[int, Call] = {}
        self._status_at_s = 0.0

    def start_threads(self) -> None:
        """Starts reading and writing."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        threading.Thread(target=self._write, name="writer", daemon=True).start()

    def send(self, kind: Kind, payload: bytes) -> None:
        """Sends a frame about the process itself."""
        self._outbox.put(Frame(kind, 0, payload))

    def flush(self) -> None:
        """Waits until everything has been written."""
        self._outbox.join()

    def serve(self, program: RankProgram) -> None:
        """Works until the front is gone."""
        self.send(Kind.READY, program.describe().SerializeToString())
        working = False
        while True:
            try:
                frame = self._inbox.get(block=not working, timeout=STATUS_PERIOD_S)
                while True:
                    if frame is None:
                        return
                    self._deliver(program, frame)
                    frame = self._inbox.get_nowait()
            except queue.Empty:
                pass
            working = program.tick()
            self._report(program)

    def _deliver(self, program: RankProgram, frame: Frame) -> None:
        if frame.kind == Kind.SHUTDOWN:
            program.drain()
            return
        if frame.kind == Kind.OPEN:
            self._calls[frame.call] = Call(frame.call, json.loads(frame.payload), self._outbox)
        call = self._calls.get(frame.call)
        if call is None:
            return
        telemetry.request_id_var.set(call.request_id)
        try:
            match frame.kind:
                case Kind.OPEN:
                    program.opened(call)
                case Kind.MESSAGE if not call.ended:
                    program.message(call, frame.payload)
                case Kind.HALF_CLOSE if not call.ended:
                    program.half_closed(call)
                case Kind.CANCEL:
                    call.cancelled = True
                    program.cancelled(call)
        except ServiceError as error:
            call.fail(error)
            program.cancelled(call)
        except Exception as error:  # noqa: BLE001 - a bug in one call must not end the others
            call.fail(bug(error))
            program.cancelled(call)
        telemetry.request_id_var.set("")
        if frame.kind == Kind.CANCEL or call.ended:
            self._calls.pop(frame.call, None)

    def _report(self, program: RankProgram) -> None:
        now_s = time.monotonic()
        if now_s - self._status_at_s >= STATUS_PERIOD_S:
            self._status_at_s = now_s
            for call_id in [call_id for call_id, call in self._calls.items() if call.ended]:
                del self._calls[call_id]
            self.send(Kind.STATUS, json.dumps(program.metrics()).encode())

    def _read(self) -> None:
        while True:
            try:
                frame = self._channel.receive()
            except OSError:
                frame = None
            self._inbox.put(frame)
            if frame is None:
                return

    def _write(self) -> None:
        while True:
            frame = self._outbox.get()
            try:
                if frame is not None:
                    self._channel.send(frame)
            except OSError:
                # The front is gone; the reader sees it too and ends the process.
                pass
            finally:
                self._outbox.task_done()


def bug(error: Exception) -> ServiceError:
    """Logs an unexpected error under a new id and returns what a client may see of it."""
    bug_id = uuid.uuid4().hex[:12]
    log.error("bug %s", bug_id, exc_info=error)
    return Internal(f"internal error {bug_id}: the log has the details")


def run(build: Callable[[StageConfig], RankProgram]) -> None:
    """The main function of every rank. `build` loads the weights and warms up."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--config-json", required=True)
    args = parser.parse_args()
    config = parse(StageConfig, json.loads(args.config_json))
    telemetry.setup(f"{config.service.name or 'stage'}/rank0")
    loop = RankLoop(BlockingChannel(socket.socket(fileno=args.channel_fd)))
    loop.start_threads()
    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    code = 0
    with torch.inference_mode():
        try:
            loop.serve(build(config))
        except StartupError as error:
            loop.send(Kind.FATAL, json.dumps({"startup": True, "message": str(error)}).encode())
            code = 2
        except Exception as error:  # noqa: BLE001 - the front must hear of it before the process ends
            log.exception("the rank cannot go on")
            loop.send(
                Kind.FATAL, json.dumps({"startup": False, "message": f"{type(error).__name__}: {error}"}).encode()
            )
            code = 1
    loop.flush()
    sys.stderr.flush()
    # Skips destructors of CUDA contexts and threads, which may hang after a device error.
    os._exit(code)
