"""A TCP relay whose network can be made bad while it runs: slow, narrow, cut, one-way, reset, one byte flipped.

TCP hides lost packets from both ends and sends again, so a cut holds bytes back; when it heals, they go on. New
connections are accepted during a cut and hear nothing: half-open. Directions are "up" (to the server) and "down".
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
CHUNK_BYTES = 16 * 1024
# On their way through a slow proxy, at most; and what the kernel may hold before it. Loopback's own buffers hold
# megabytes, which a slow line would have to carry before a ping that comes behind them.
CHUNKS_UNDER_WAY = 32
RECEIVE_BUFFER_BYTES = 128 * 1024
BOTH = ("up", "down")
_RESET = struct.pack("ii", 1, 0)


class Network:
    """The event loop of all proxies, in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="network", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        """Ends the loop."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


class Proxy:
    """Relays a port of its own to `target`. Every method may be called from any thread.

    Args:
        note: told of every cut and its end, as what happens ("cut" or "heal") and the directions.
    """

    def __init__(self, network: Network, target: str, note: Callable[[str, list[str]], None]) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._network = network
        self._note = note
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets: set[socket.socket] = set()
        self._delay_s = 0.0
        self._bytes_per_s = 0.0
        self._passed = dict.fromkeys(BOTH, 0)
        self._flip_at: dict[str, int] = {}
        self._reset_at: dict[str, int] = {}
        self._way = {direction: asyncio.Event() for direction in BOTH}
        self._server = network.run(self._start())
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _start(self) -> asyncio.Server:
        for way in self._way.values():
            way.set()
        listening = socket.socket()
        # Before it listens: what it accepts inherits it.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        listening.bind(("127.0.0.1", 0))
        return await asyncio.start_server(self._relay, sock=listening)

    def slow(self, *, delay_s: float = 0.0, bytes_per_s: float = 0.0) -> None:
        """A delay each way, and a rate (0: unbounded)."""
        self._delay_s, self._bytes_per_s = delay_s, bytes_per_s

    def cut(self, *directions: str) -> None:
        """Nothing passes in these directions, until `heal`."""
        self._note("cut", list(directions))
        self._network.loop.call_soon_threadsafe(lambda: [self._way[name].clear() for name in directions])

    def heal(self) -> None:
        """Everything passes again, what was held back first."""
        self._note("heal", [])
        self._network.loop.call_soon_threadsafe(lambda: [way.set() for way in self._way.values()])

    def reset(self) -> None:
        """Both ends of every connection see it reset."""
        self._network.loop.call_soon_threadsafe(self._reset)

    def reset_after(self, direction: str, nbytes: int) -> None:
        """A reset once so many more bytes have come that way."""
        self._reset_at[direction] = self._passed[direction] + nbytes

    def flip_after(self, direction: str, nbytes: int) -> None:
        """Changes one byte, behind so many more of that direction."""
        self._flip_at[direction] = self._passed[direction] + nbytes

    def close(self) -> None:
        """Ends every connection and the port."""
        self._network.run(self._close())

    async def _close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _reset(self) -> None:
        for opened in self._sockets:
            with contextlib.suppress(OSError):
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        for task in self._tasks:
            task.cancel()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers = [writer]
        ways: list[asyncio.Task[None]] = []
        try:
            there, onward = await asyncio.open_connection(*self._target)
            writers.append(onward)
            sockets = {w.get_extra_info("socket")._sock for w in writers}
            self._sockets |= sockets
            passes = self._pass(reader, onward, "up"), self._pass(there, writer, "down")
            ways = [asyncio.create_task(way) for way in passes]
            await asyncio.gather(*ways)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            # The one that is left when the other way breaks may wait for room that nobody makes.
            for way in ways:
                way.cancel()
            for opened in writers:
                self._sockets.discard(opened.get_extra_info("socket")._sock)
                opened.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_UNDER_WAY)
        sending = asyncio.create_task(self._send(under_way, writer, direction))
        try:
            while data := await reader.read(CHUNK_BYTES):
                await under_way.put((asyncio.get_running_loop().time() + self._delay_s, data))
            await under_way.put((0.0, b""))
            await sending
        finally:
            sending.cancel()

    async def _send(
        self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, direction: str
    ) -> None:
        clock = asyncio.get_running_loop().time
        free_s = 0.0
        while True:
            due_s, data = await under_way.get()
            if not data:
                writer.write_eof()
                return
            free_s = max(due_s, free_s) + (len(data) / self._bytes_per_s if self._bytes_per_s else 0.0)
            # By the clock: sleeps are longer than they should be, and a rate must not suffer from it.
            await asyncio.sleep(max(0.0, free_s - clock()))
            await self._way[direction].wait()
            writer.write(self._spoilt(data, direction))
            await writer.drain()

    def _spoilt(self, data: bytes, direction: str) -> bytes:
        before = self._passed[direction]
        self._passed[direction] = after = before + len(data)
        if before <= self._flip_at.get(direction, -1) < after:
            index = self._flip_at.pop(direction) - before
            data = data[:index] + bytes((data[index] ^ 0x40,)) + data[index + 1 :]
        if after > self._reset_at.get(direction, after):
            del self._reset_at[direction]
            self._reset()
        return data
