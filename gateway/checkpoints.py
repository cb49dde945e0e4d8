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
    """What a denoiser needs to go on after `step`: its messages, as they came.

    `expert` takes the next step where the denoiser that made it could not: another one holds it.
    """

    step: int
    messages: Sequence[bytes]
    expert: str = ""


class Checkpoints:
    """Those of one request in work.

    Args:
        every_s: seconds of denoising that a fault may cost at most; a request that is done sooner has no checkpoint.

    Attributes:
        onward: the last one, when it is for another expert.
    """

    def __init__(self, state: State, store: Store, work: Work, every_s: float, lease_s: float) -> None:
        self._state = state
        self._store = store
        self._work = work
        self._every_s = every_s
        self._lease_s = lease_s
        self._last_s = time.monotonic()
        self.onward: Checkpoint | None = None

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

        One for another expert is left to `hand_on`.

        Who is cancelled meanwhile waits all the same: a file that is not noted would be nobody's.
        """
        if checkpoint.expert:
            self.onward = checkpoint
        else:
            await to_its_end(self._keep(checkpoint))

    async def _keep(self, checkpoint: Checkpoint) -> None:
        before = list(self._work.checkpoints)
        try:
            # Not worth waiting for room.
            kept = await self._put(checkpoint, time.monotonic())
            self._work.checkpoints[:] = [kept, *before][:KEPT]
            noted = await self._note()
        except (OSError, ServiceError) as error:
            log.warning("no checkpoint of step %d: %s", checkpoint.step, error)
            noted = "lost"
        if noted == "lost":
            self._work.checkpoints[:] = before
            await self._store.drop_latents(self._name(checkpoint))
            return
        await self._store.drop_latents(*(old.name for old in before[KEPT - 1 :]))

    async def hand_on(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Stores one for another denoiser, when there is room; returns what the commit has to note with it.

        Raises:
            ServiceError: it could not be stored.
        """
        try:
            kept = await self._put(checkpoint, self._work.deadline_s)
        except BaseException:
            await to_its_end(self._store.drop_latents(self._name(checkpoint)))
            raise
        # From now on, it goes with the request.
        self._work.checkpoints.insert(0, kept)
        step, checkpoints = self._noted
        return {"checkpoint_step": str(step), "checkpoints": checkpoints}

    async def _put(self, checkpoint: Checkpoint, until_s: float) -> Kept:
        name = self._name(checkpoint)
        await self._store.put_latents(name, checkpoint.messages, until_s)
        return Kept(name, checkpoint.step, await asyncio.to_thread(_digest, checkpoint.messages))

    def _name(self, checkpoint: Checkpoint) -> str:
        return f"{self._work.request_id}.{self._work.claim.fence}.{checkpoint.step}"

    async def forget(self) -> None:
        """The denoiser cannot go on from them: the next attempt begins anew.

        Raises:
            StateStoreDown: Redis does not answer.
        """
        dropped, self._work.checkpoints[:] = list(self._work.checkpoints), []
        await self._note()
        await self._store.drop_latents(*(old.name for old in dropped))

    async def _note(self) -> str:
        return await self._state.checkpoint(self._work.claim, self._lease_s, *self._noted)

    @property
    def _noted(self) -> tuple[int, str]:
        """The newest one's step, and all of them as a record has them."""
        kept = self._work.checkpoints
        return (kept[0].step, json.dumps([asdict(one) for one in kept])) if kept else (0, "")


async def drop_between_stages(state: State, store: Store, request_id: str) -> None:
    """Drops the latents and checkpoints of a request that has ended."""
    names = [kept.name for kept in kept_in(await state.get(request_id))]
    await store.drop_latents(request_id, *names)


def _digest(messages: Sequence[bytes]) -> str:
    whole = hashlib.sha256()
    for message in messages:
        whole.update(len(message).to_bytes(8, "little") + message)
    return whole.hexdigest()
