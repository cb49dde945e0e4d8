"""What an artifact is recognised by: its SHA-256, and those of its pieces, which are checked before they are sent."""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

# An artifact is checked and sent in such pieces: most pictures are one.
CHUNK_BYTES = 4 * 1024 * 1024
# Whoever has added so much waits until it is hashed: bytes that come faster wait with their sender.
WAITING_BYTES = 16 * 1024 * 1024


class Digests:
    """Hashes bytes as they come, on a thread of its own: at the end of a large clip little is left to do.

    The thread begins with the first `add`. `close` it in any case.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "digests")
        self._last: Future[None] | None = None
        self._waiting_bytes = 0
        self._whole = hashlib.sha256()
        self._chunks: list[str] = []
        self._chunk = hashlib.sha256()
        self._chunk_bytes = 0

    @classmethod
    def of(cls, data: bytes | bytearray) -> Digests:
        """Of what is whole; in this thread."""
        digests = cls()
        digests._take(data)
        return digests

    async def add(self, data: bytes) -> None:
        """The next bytes. Mostly returns at once; every `WAITING_BYTES` it waits until all are hashed."""
        self._last = self._thread.submit(self._take, data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= WAITING_BYTES:
            await asyncio.wrap_future(self._last)
            self._waiting_bytes = 0

    def ended(self) -> tuple[str, list[str]]:
        """(of all bytes, of each `CHUNK_BYTES` of them), in hex; waits until all are hashed."""
        if self._last is not None:
            self._last.result()
        rest = [self._chunk.hexdigest()] if self._chunk_bytes else []
        return self._whole.hexdigest(), self._chunks + rest

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self, data: bytes | bytearray) -> None:
        self._whole.update(data)
        view = memoryview(data)
        while view:
            part = view[: CHUNK_BYTES - self._chunk_bytes]
            view = view[len(part) :]
            self._chunk.update(part)
            self._chunk_bytes += len(part)
            if self._chunk_bytes == CHUNK_BYTES:
                self._chunks.append(self._chunk.hexdigest())
                self._chunk, self._chunk_bytes = hashlib.sha256(), 0
