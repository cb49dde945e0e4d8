"""Checkpoints of a request in the denoiser: when one is due, where they are kept, and which one it goes on from.

A checkpoint is the denoiser's own bundle of tensor frames, kept beside the latents under a name with the owner's fence.
Its sha256 is in the request's record: what was cut or altered is passed over for the one before it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from gateway.state import State
from gateway.store import Store
from gateway.to_its_end import to_its_end
from gateway.work import Kept, Work, kept_in
from services.errors import ServiceError

log = logging.getLogger(__name__)

# The newest one may be cut short by the very fault that makes it needed.
KEPT = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a denoiser needs to go on after `step`: its messages, as they came."""

    step: int
    messages: Sequence[bytes]


class Checkpoints:
    """Those of one request in work.

    Args:
        every_s: seconds of denoising that a fault may cost at most; a request that is done sooner has no checkpoint.
    """

    def __init__(self, state: State, store: Store, work: Work, every_s: float, lease_s: float) -> None:
        self._state = state
        self._store = store
        self._work = work
        self._every_s = every_s
        self._lease_s = lease_s
        self._last_s = time.monotonic()

    def due(self, step: int, total: int) -> bool:
        """Whether the step that was just made should be followed by a checkpoint. True once for each."""
        now_s = time.monotonic()
        if now_s - self._last_s < self._every_s or step >= total - 1:
            return False
        self._last_s = now_s
        return True

    async def newest(self) -> Checkpoint | None:
        """What the request can go on from: the newest one that is whole."""
        for kept in self._work.checkpoints:
            try:
                messages = await self._store.latents(kept.name)
            except ServiceError as error:
                log.warning("checkpoint %s: %s", kept.name, error.message)
                continue
            if await asyncio.to_thread(_digest, messages) == kept.sha256:
                log.info("goes on from step %d", kept.step)
                return Checkpoint(kept.step, messages)
            log.warning("checkpoint %s is not what was written: passed over", kept.name)
        return None

    async def keep(self, checkpoint: Checkpoint) -> None:
        """Stores one and notes it under the fence. One that cannot be stored is no reason to stop.

        Who is cancelled meanwhile waits all the same: a file that is not noted would be nobody's.
        """
        await to_its_end(self._keep(checkpoint))

    async def _keep(self, checkpoint: Checkpoint) -> None:
        name = f"{self._work.request_id}.{self._work.claim.fence}.{checkpoint.step}"
        before = list(self._work.checkpoints)
        try:
            # Not worth waiting for room.
            await self._store.put_latents(name, checkpoint.messages, time.monotonic())
            digest = await asyncio.to_thread(_digest, checkpoint.messages)
            self._work.checkpoints[:] = [Kept(name, checkpoint.step, digest), *before][:KEPT]
            noted = await self._note()
        except (OSError, ServiceError) as error:
            log.warning("no checkpoint of step %d: %s", checkpoint.step, error)
            noted = "lost"
        if noted == "lost":
            self._work.checkpoints[:] = before
            await self._store.drop_latents(name)
            return
        await self._store.drop_latents(*(old.name for old in before[KEPT - 1 :]))

    async def forget(self) -> None:
        """The denoiser cannot go on from them: the next attempt begins anew.

        Raises:
            StateStoreDown: Redis does not answer.
        """
        dropped, self._work.checkpoints[:] = list(self._work.checkpoints), []
        await self._note()
        await self._store.drop_latents(*(old.name for old in dropped))

    async def _note(self) -> str:
        kept = self._work.checkpoints
        step = kept[0].step if kept else 0
        text = json.dumps([asdict(one) for one in kept]) if kept else ""
        return await self._state.checkpoint(self._work.claim, self._lease_s, step, text)


async def drop_between_stages(state: State, store: Store, request_id: str) -> None:
    """Drops the latents and checkpoints of a request that has ended."""
    names = [kept.name for kept in kept_in(await state.get(request_id))]
    await store.drop_latents(request_id, *names)


def _digest(messages: Sequence[bytes]) -> str:
    whole = hashlib.sha256()
    for message in messages:
        whole.update(len(message).to_bytes(8, "little") + message)
    return whole.hexdigest()
