"""Removes from the artifact store what no request needs any more. Every gateway does it; twice does no harm.

A listing comes first, the requests' records after it, and removals are by exact name. A name holds its owner's fence,
and fences only rise: what no record could name then, none will name later.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge

from gateway.config import StoreSection
from gateway.objects import KINDS, Stored
from gateway.records import TERMINAL, Holding
from gateway.state import State
from gateway.store import Store
from services.errors import ServiceError, StartupError

log = logging.getLogger(__name__)

_ARTIFACT = re.compile(r"artifacts/(?P<request>[^./]+)\.(?P<fence>[0-9]+)(\.json)?")
# A checkpoint stands among the latents, with the fence of its writer and its step.
_LATENTS = re.compile(r"latents/(?P<request>[^./]+)(\.[0-9]+\.[0-9]+)?")


class Sweep:
    """Looks through the store every `sweep_s` seconds.

    Args:
        keep_s: how long a request's record lives. What has no record stays as long: should Redis have lost its records,
            nothing goes before its time.
        registry: of the metrics.
    """

    def __init__(
        self, state: State, store: Store, section: StoreSection, keep_s: float, registry: CollectorRegistry
    ) -> None:
        if section.sweep_s <= 0 or section.sweep_age_s < 0:
            raise StartupError("store.sweep_s must be positive, and store.sweep_age_s not negative")
        self._state = state
        self._store = store
        self._section = section
        self._keep_s = keep_s
        self._bytes = Gauge("lightloom_store_bytes", "Bytes in the artifact store", ["kind"], registry=registry)
        self._files = Gauge("lightloom_store_files", "Files in the artifact store", ["kind"], registry=registry)
        self._swept = Counter("lightloom_store_swept", "Files that no request needed", ["kind"], registry=registry)
        refusing = Gauge("lightloom_store_refusing", "1 while the artifact store is full or away", registry=registry)
        refusing.set_function(lambda: store.writes.refusal is not None)

    async def run(self) -> None:
        """Sweeps, for ever. Gateways that start together begin at different times."""
        await asyncio.sleep(random.uniform(0, self._section.sweep_s))
        while True:
            for kind in KINDS:
                try:
                    await self.once(kind)
                except ServiceError as error:
                    log.warning("no sweep of %s now: %s", kind, error.message)
            await asyncio.sleep(self._section.sweep_s)

    async def once(self, kind: str) -> None:
        """Looks through the objects of a kind.

        Raises:
            ArtifactStoreDown, StateStoreDown: the store or Redis does not answer.
        """
        files = nbytes = 0
        async for batch in self._store.listed(kind):
            useless = await self._useless(batch)
            await self._store.delete([stored.name for stored in useless])
            self._swept.labels(kind).inc(len(useless))
            if useless:
                log.info("swept %d of %s", len(useless), kind)
            files += len(batch) - len(useless)
            nbytes += sum(stored.nbytes for stored in batch) - sum(stored.nbytes for stored in useless)
        self._files.labels(kind).set(files)
        self._bytes.labels(kind).set(nbytes)

    async def _useless(self, batch: Sequence[Stored]) -> list[Stored]:
        now_s = time.time()
        # Nothing that is being written now, or was listed a moment before its request's record told of it.
        old = [stored for stored in batch if now_s - stored.modified_unix_s > self._section.sweep_age_s]
        ids = sorted({request for stored in old if (request := request_of(stored.name))})
        holdings = dict(zip(ids, await self._state.holdings(ids), strict=True))
        lost_s = now_s - self._keep_s
        return [
            stored
            for stored in old
            if not is_needed(stored, holdings.get(request_of(stored.name)), lost_before_unix_s=lost_s)
        ]


def request_of(name: str) -> str:
    """Whose an object is; empty for one that is no artifact and no latents."""
    match = _ARTIFACT.fullmatch(name) or _LATENTS.fullmatch(name)
    return match["request"] if match else ""


def is_needed(stored: Stored, holding: Holding | None, *, lost_before_unix_s: float) -> bool:
    """Whether an object that is older than the guard's age must stay.

    Args:
        holding: what its request's record says of it; None without a record.
        lost_before_unix_s: older than this, what has no record goes.
    """
    if not request_of(stored.name):
        # Left behind by a writer that died; anything else was not put there by us.
        return not stored.name.endswith(".part") and not stored.name.startswith("probes/")
    if holding is None:
        return stored.modified_unix_s > lost_before_unix_s
    artifact = _ARTIFACT.fullmatch(stored.name)
    if artifact is None:
        return holding.state not in TERMINAL
    if holding.state in TERMINAL:
        return stored.name.removesuffix(".json") == f"artifacts/{holding.file}"
    return artifact["fence"] == holding.fence
