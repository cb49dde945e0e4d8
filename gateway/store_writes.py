"""Writes to the artifact store that wait while it is full or away, and what it means for the rest meanwhile."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from functools import partial

from gateway.objects import Objects, Pieces
from gateway.to_its_end import to_its_end
from services.errors import ArtifactStoreDown, ArtifactStoreFull, ErrorRecord, ServiceError

log = logging.getLogger(__name__)

RETRY_S = 0.5
MAX_RETRY_S = 5.0
PROBE_BYTES = 64 * 1024
PROBE_PERIOD_S = 1.0
# What may wait here in memory for room in the store before no new work is begun.
MAX_WAITING_BYTES = 256 * 1024 * 1024


class StoreWrites:
    """What was computed is dear, so a write that is refused is tried again, until its request's deadline.

    As long as the store takes nothing, `refusal` says why, and nothing new shall be begun: then no more waits than what
    was under way. A small write each second finds out when it is over. One large object that alone has no room is its
    own trouble.
    """

    def __init__(self, objects: Objects, threads: Executor) -> None:
        self._objects = objects
        self._threads = threads
        self._refusal: ErrorRecord | None = None
        self._waiting_bytes = 0
        self._probing: asyncio.Task[None] | None = None
        self.on_open: Callable[[], None] = lambda: None

    @property
    def refusal(self) -> ServiceError | None:
        """Why the store takes nothing now; None when it does."""
        return self._refusal.error() if self._refusal else None

    async def write(
        self, objects: Callable[[], Mapping[str, Pieces]], nbytes: int, *, durable: bool, until_s: float
    ) -> None:
        """As Objects.write, again and again until it works.

        Args:
            objects: makes them, in the thread that writes.
            nbytes: what they hold in memory.

        Raises:
            ArtifactStoreFull, ArtifactStoreDown: it has not worked until then.
        """
        pause_s, waiting = RETRY_S, 0
        try:
            while True:
                try:
                    return await self._in_thread(lambda: self._objects.write(objects(), durable=durable))
                except (ArtifactStoreFull, ArtifactStoreDown) as error:
                    if time.monotonic() >= until_s:
                        raise
                    if not waiting:
                        waiting = nbytes
                        self._waiting_bytes += waiting
                    self._refuse(error)
                await asyncio.sleep(max(0.0, min(pause_s, until_s - time.monotonic())))
                pause_s = min(2 * pause_s, MAX_RETRY_S)
        finally:
            self._waiting_bytes -= waiting

    async def _in_thread(self, write: Callable[[], None]) -> None:
        """Who is cancelled waits for it all the same: nothing must be written after the clean-up."""
        await to_its_end(asyncio.get_running_loop().run_in_executor(self._threads, write))

    def _refuse(self, error: ServiceError) -> None:
        if self._refusal is None:
            log.warning("no new work: %s", error.message)
        self._refusal = ErrorRecord.of(error)
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        name = f"probes/{secrets.token_hex(8)}"
        while True:
            try:
                await self._in_thread(partial(self._objects.write, {name: [bytes(PROBE_BYTES)]}, durable=False))
                await self._in_thread(partial(self._objects.delete, [name]))
                if self._waiting_bytes <= MAX_WAITING_BYTES:
                    break
            except (ArtifactStoreFull, ArtifactStoreDown) as error:
                self._refusal = ErrorRecord.of(error)
            await asyncio.sleep(PROBE_PERIOD_S)
        log.info("the artifact store takes writes")
        self._refusal = None
        self.on_open()
