"""Frames between a front and its rank process, over one socket pair.

`u32 payload length | u8 kind | u64 call id | payload`, little endian. Messages of a call are the serialised protos as
the client sent or will receive them. The front is asyncio (`AsyncChannel`); the rank reads and writes in threads
(`BlockingChannel`, `FrameQueue`). Call 0 is the rank process itself.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import NamedTuple

from services.errors import ErrorRecord, ServiceError

HEADER = struct.Struct("<IBQ")
TAKEN = struct.Struct("<Q")
MAX_FRAME_BYTES = 8 * 1024 * 1024
# A call has room for more while fewer bytes of it are on their way to its caller.
CALL_ROOM_BYTES = 8 * 1024 * 1024
PROCESS = 0

# Above HIGH an AsyncChannel asks its senders to wait, until it is down to LOW.
_HIGH_BYTES, _LOW_BYTES = 4 * 1024 * 1024, 1024 * 1024
_READS_A_TURN = 64
_BUFFERS_A_WRITE = 16


class Kind(IntEnum):
    """What a frame is. Front to rank first, rank to front after 16, MESSAGE both ways."""

    OPEN = 1
    MESSAGE = 2
    HALF_CLOSE = 3
    CANCEL = 4
    SHUTDOWN = 5
    TAKEN = 6
    READY = 17
    FINISH = 18
    ERROR = 19
    STATUS = 20
    FATAL = 21
    BEAT = 22


_KINDS = {int(kind): kind for kind in Kind}


class Frame(NamedTuple):
    """One frame; `call_id` is PROCESS (0) for what concerns the rank process as a whole."""

    kind: Kind
    call_id: int
    payload: bytes


def taken_to_bytes(num_bytes: int) -> bytes:
    """Payload of TAKEN: so many bytes of a call's messages have gone on to its caller."""
    return TAKEN.pack(num_bytes)


class ChannelBroken(Exception):
    """The peer sent something that is no frame: a bug, or another version."""


@dataclass(frozen=True, slots=True)
class OpenCall:
    """Payload of OPEN. `deadline_unix_s` is 0 when the call has none."""

    method: str
    request_id: str
    traceparent: str = ""
    deadline_unix_s: float = 0.0
    fence: int = 0

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> OpenCall:
        """From JSON."""
        return cls(**json.loads(data))


@dataclass(frozen=True, slots=True)
class Fatal:
    """Payload of FATAL, the last frame of a rank: `startup` when the config or the weights are at fault."""

    startup: bool
    message: str

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Fatal:
        """From JSON."""
        return cls(**json.loads(data))


def error_to_bytes(error: ServiceError) -> bytes:
    """Payload of ERROR."""
    return json.dumps(asdict(ErrorRecord.of(error))).encode()


def error_from_bytes(data: bytes) -> ServiceError:
    """The exception in an ERROR frame."""
    return ErrorRecord(**json.loads(data)).error()


def pack_header(kind: Kind, call_id: int, payload: bytes) -> bytes:
    """The 13 bytes before a payload.

    Raises:
        ValueError: the payload is larger than a frame may be.
    """
    if len(payload) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(payload)} bytes: at most {MAX_FRAME_BYTES} are allowed")
    return HEADER.pack(len(payload), kind, call_id)


def unpack_header(header: bytes) -> tuple[int, Kind, int]:
    """(payload length, kind, call id).

    Raises:
        ChannelBroken: not a frame of ours.
    """
    length, kind, call_id = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES or kind not in _KINDS:
        raise ChannelBroken(f"kind {kind} with {length} bytes is no frame")
    return length, _KINDS[kind], call_id


class BlockingChannel:
    """The rank's end: one thread may receive while another sends."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._socket = sock

    def receive(self) -> Frame | None:
        """The next frame; None when the front is gone."""
        header = self._exactly(HEADER.size)
        if header is None:
            return None
        length, kind, call_id = unpack_header(header)
        payload = self._exactly(length)
        return None if payload is None else Frame(kind, call_id, payload)

    def send(self, frames: list[Frame]) -> None:
        """Writes the frames, a few system calls for all of them. Raises OSError when the front is gone."""
        buffers = [part for f in frames for part in (pack_header(f.kind, f.call_id, f.payload), f.payload) if part]
        for first in range(0, len(buffers), _BUFFERS_A_WRITE):
            some = buffers[first : first + _BUFFERS_A_WRITE]
            sent = self._socket.sendmsg(some)
            for part in some:
                if sent < len(part):
                    self._socket.sendall(memoryview(part)[sent:])
                sent = max(0, sent - len(part))

    def _exactly(self, size: int) -> bytes | None:
        if size == 0:
            return b""
        # With MSG_WAITALL the kernel fills one bytes object: no copy here.
        data = self._receive(size)
        while data and len(data) < size:
            more = self._receive(size - len(data))
            if not more:
                return None
            data += more
        return data or None

    def _receive(self, size: int) -> bytes:
        try:
            return self._socket.recv(size, socket.MSG_WAITALL)
        except OSError:
            return b""


class FrameQueue:
    """A queue between threads, bounded in bytes. A single item may exceed the bound when the queue is empty."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._frames: deque[Frame] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, frame: Frame, dropped: Callable[[], bool] | None = None) -> None:
        """Adds a frame; waits while the queue is full.

        Args:
            dropped: asked while waiting; once it says True the frame is forgotten.
        """
        with self._changed:
            while self._bytes and self._bytes + len(frame.payload) > self._max_bytes and not self._closed:
                if dropped is not None and dropped():
                    return
                self._changed.wait(0.1)
            self._frames.append(frame)
            self._bytes += len(frame.payload) + HEADER.size
            self._changed.notify_all()

    def take(self, timeout_s: float | None) -> list[Frame]:
        """All frames at hand; waits for the first one, `timeout_s` at most (None: until there is one or `close`)."""
        if timeout_s == 0 and not self._frames:
            # Between two steps: no lock for nothing.
            return []
        with self._changed:
            if not self._frames and not self._closed and timeout_s != 0:
                self._changed.wait_for(lambda: bool(self._frames) or self._closed, timeout_s)
            frames = list(self._frames)
            self._frames.clear()
            self._bytes = 0
            self._changed.notify_all()
            return frames

    def take_exactly(self, count: int) -> list[Frame]:
        """The next `count` frames; waits until all are there. Fewer only after `close`."""
        frames: list[Frame] = []
        with self._changed:
            while len(frames) < count and not (self._closed and not self._frames):
                self._changed.wait_for(lambda: bool(self._frames) or self._closed)
                while self._frames and len(frames) < count:
                    frames.append(self._frames.popleft())
                    self._bytes = max(0, self._bytes - len(frames[-1].payload) - HEADER.size)
                self._changed.notify_all()
        return frames

    def close(self) -> None:
        """No more waiting, on either side."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed


class AsyncChannel:
    """The front's end, in the event loop.

    Args:
        sock: one end of a socket pair.
        on_frame: called for every frame, in order.
        on_closed: called once, when the rank's end is gone or broken.
    """

    def __init__(self, sock: socket.socket, on_frame: Callable[[Frame], None], on_closed: Callable[[], None]) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._parts: list[bytes] = []
        self._missing = HEADER.size
        self._head: tuple[Kind, int] | None = None
        self._outgoing: deque[memoryview] = deque()
        self._outgoing_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self.paused = False
        self.closed = False
        self._loop.add_reader(sock, self._readable)

    def send(self, kind: Kind, call_id: int = PROCESS, payload: bytes = b"") -> None:
        """Writes a frame, or keeps it until the socket takes it; never waits (see `drained`)."""
        if self.closed:
            return
        header = pack_header(kind, call_id, payload)
        idle = not self._outgoing
        self._outgoing.extend(memoryview(part) for part in (header, payload) if part)
        self._outgoing_bytes += len(header) + len(payload)
        if idle:
            self._writable()
        if self._outgoing_bytes > _HIGH_BYTES:
            self._room.clear()

    async def drained(self) -> None:
        """Waits until the channel has room again: call it after `send` to get back-pressure."""
        await self._room.wait()

    def pause(self) -> None:
        """Stops reading: the rank's writer will wait in turn."""
        if not self.paused and not self.closed:
            self.paused = True
            self._loop.remove_reader(self._socket)

    def resume(self) -> None:
        """Reads again."""
        if self.paused and not self.closed:
            self.paused = False
            self._loop.add_reader(self._socket, self._readable)

    def close(self) -> None:
        """Closes this end; the rank sees the end of its stream."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._outgoing.clear()
        self._room.set()
        self._on_closed()

    def read_rest(self) -> None:
        """Takes what a dead rank left in the socket, then closes."""
        self.paused = False
        while not self.closed and self._readable():
            pass
        self.close()

    def _readable(self) -> bool:
        """Reads what is there, a bounded number of times; False when nothing more is there now."""
        try:
            for _ in range(_READS_A_TURN):
                if self.closed or self.paused:
                    return False
                part = self._socket.recv(self._missing)
                if not part:
                    self.close()
                    return False
                self._parts.append(part)
                self._missing -= len(part)
                if not self._missing:
                    # Mostly one part, which then is passed on without a copy.
                    data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                    self._parts.clear()
                    self._complete(data)
        except BlockingIOError:
            return False
        except (OSError, ChannelBroken):
            self.close()
            return False
        return True

    def _complete(self, data: bytes) -> None:
        """A header opens a payload, a payload makes a frame."""
        if self._head is None:
            length, kind, call_id = unpack_header(data)
            if length:
                self._head, self._missing = (kind, call_id), length
                return
            frame = Frame(kind, call_id, b"")
        else:
            frame = Frame(*self._head, data)
        self._head, self._missing = None, HEADER.size
        self._on_frame(frame)

    def _writable(self) -> None:
        try:
            while self._outgoing:
                some = [self._outgoing[index] for index in range(min(len(self._outgoing), _BUFFERS_A_WRITE))]
                self._take_sent(self._socket.sendmsg(some))
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._writable)
        except OSError:
            # The reader meets the end of the stream next, after what the rank still had to say.
            self._outgoing.clear()
            self._outgoing_bytes = 0
        if not self._outgoing:
            self._loop.remove_writer(self._socket)
        if self._outgoing_bytes <= _LOW_BYTES:
            self._room.set()

    def _take_sent(self, sent: int) -> None:
        self._outgoing_bytes -= sent
        while sent:
            part = self._outgoing[0]
            if sent < len(part):
                self._outgoing[0] = part[sent:]
                return
            sent -= len(part)
            self._outgoing.popleft()
