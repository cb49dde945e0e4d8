"""The local channel between a front and its rank: frames over a unix socket.

A frame is `u32 length | u8 kind | u64 call` (little endian) and `length` bytes. The rank's side blocks and is used by
one reader and one writer thread; the front's side is asyncio. Payloads are serialised messages or JSON, never objects.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

from services.tensor_wire import MAX_MESSAGE_BYTES

HEADER = struct.Struct("<IBQ")
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
# Encode requests carry input pictures, so a frame may be as large as a gRPC message.
MAX_FRAME_BYTES = 2 * MAX_MESSAGE_BYTES


class Kind(IntEnum):
    """What a frame is. Up to 15 from the front, from 16 on from the rank."""

    OPEN = 1
    MESSAGE = 2
    HALF_CLOSE = 3
    CANCEL = 4
    SHUTDOWN = 5
    READY = 16
    REPLY = 17
    FINISH = 18
    ERROR = 19
    STATUS = 20
    FATAL = 21


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; call 0 is the process itself."""

    kind: Kind
    call: int
    payload: bytes = b""


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends with buffers large enough for a few chunks."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    return ends


class BlockingChannel:
    """The rank's end."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._file = end.makefile("rb", buffering=256 * 1024)

    def receive(self) -> Frame | None:
        """The next frame; None when the front is gone."""
        head = self._file.read(HEADER.size)
        if len(head) < HEADER.size:
            return None
        length, kind, call = HEADER.unpack(head)
        payload = self._file.read(length)
        return Frame(Kind(kind), call, payload) if len(payload) == length else None

    def send(self, frame: Frame) -> None:
        """Writes a frame; blocks while the front does not read.

        Raises:
            OSError: the front is gone.
        """
        parts = [HEADER.pack(len(frame.payload), frame.kind, frame.call), frame.payload]
        sent = self._socket.sendmsg(parts)
        if sent < HEADER.size + len(frame.payload):
            self._socket.sendall(memoryview(b"".join(parts))[sent:])


class AsyncChannel:
    """The front's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> AsyncChannel:
        """Takes over the socket."""
        end.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=end, limit=SOCKET_BUFFER_BYTES))

    async def receive(self) -> Frame | None:
        """The next frame; None when the rank is gone."""
        try:
            length, kind, call = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            return Frame(Kind(kind), call, await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def send(self, frame: Frame) -> None:
        """Writes a frame; waits while the rank does not read. A rank that is gone is noticed by `receive`."""
        try:
            self._writer.write(HEADER.pack(len(frame.payload), frame.kind, frame.call))
            if frame.payload:
                self._writer.write(frame.payload)
            await self._writer.drain()
        except ConnectionError:
            return

    def close(self) -> None:
        """Closes the socket."""
        self._writer.close()
