"""Brings queued requests to replicas with a credit, and gives back what dead gateways held."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Mapping
from typing import cast

from gateway.config import GatewaySection
from gateway.lifecycle import Lifecycle
from gateway.records import Claim, queue_key
from gateway.replica import Replica
from gateway.replicas import Replicas
from gateway.state import Fields, State
from gateway.store_writes import StoreWrites
from gateway.ticket import Offer, Start, Ticket
from gateway.to_its_end import to_its_end
from gateway.withdrawals import Withdrawals
from protos import types_pb2
from services.errors import DeviceLost, ServiceError, StateStoreDown
from services.wire import error_to_proto

log = logging.getLogger(__name__)

IDLE_S = 0.5
# Twice that after a lease has passed, at the latest, its request is given back.
REAP_S = 0.5
# What a stopping gateway gives its stages for a last step or a short decode.
HAND_BACK_S = 5.0
CLAIMED_STAGES = ("vae", "dit")


class Dispatcher:
    """One loop that claims, one that reaps; each claim runs in a task of its own."""

    def __init__(
        self, state: State, replicas: Replicas, lifecycle: Lifecycle, writes: StoreWrites, config: GatewaySection
    ) -> None:
        self._state = state
        self._replicas = replicas
        self._lifecycle = lifecycle
        self._writes = writes
        self._config = config
        self._wake = asyncio.Event()
        self._claiming = False
        self._running: dict[str, asyncio.Task[None]] = {}
        self._aborted_early: set[str] = set()
        self._ended: list[str] = []
        # Submits that may have claimed without an answer, by id and mark.
        self._unanswered: Withdrawals[tuple[str, str]] = Withdrawals(self._give_back)
        self._stopping = False

    @property
    def running(self) -> int:
        """Requests that this gateway has claimed."""
        return len(self._running)

    def wake(self) -> None:
        """There may be something to claim."""
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        """Stops the work on a request that was aborted, if it is ours."""
        if task := self._running.get(request_id):
            self._lifecycle.aborted.add(request_id)
            task.cancel()
        else:
            # It may be the one that a claim under way brings.
            self._aborted_early.add(request_id)

    def forget(self, request_id: str) -> None:
        """A request has ended in its queue: what its earlier stages left goes with the next sweep."""
        self._ended.append(request_id)

    async def run(self) -> None:
        """Claims, for ever."""
        while True:
            self._wake.clear()
            try:
                await self._claim_all()
            except ServiceError as error:
                log.warning("cannot claim: %s", error.message)
                # Claims without an answer hold requests until their leases run out: no more until Redis takes writes.
                while not await self._state.writable():
                    pass
            # Not by wait_for: in Python 3.11 it swallows a cancel that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_S):
                    await self._wake.wait()

    async def submit(self, request_id: str, queue: str, ticket: Ticket, fields: Fields, inputs: bytes = b"") -> bool:
        """Stores a request as State.submit does, and starts it when nobody waits before it and a replica is free.

        Who is cancelled meanwhile waits all the same: a claim that Redis has made must find its owner, or its replica
        would miss a slot until the lease ends.
        """
        return await to_its_end(self._submit(request_id, queue, ticket, fields, inputs))

    async def _submit(self, request_id: str, queue: str, ticket: Ticket, fields: Fields, inputs: bytes) -> bool:
        params, memory = types_pb2.GenerationParams.FromString(cast(bytes, fields["params"])), self._lifecycle.memory
        await memory.ask(params)
        # While the loop claims, what it will hold is not known: the request joins the queue, where the loop finds it.
        waits = self._stopping or self._claiming
        replica, offer = ({} if waits else self._free()).get(queue, (None, Offer()))
        if replica is None or not offer.feeds_one(ticket.feed):
            return (await self._state.submit(request_id, queue, ticket, fields, inputs=inputs))[0]
        start = Start(self._config.lease_s, offer)
        with replica.in_use(ticket.batch), memory.held_by(params, ticket.nbytes):
            try:
                stored, claim = await self._state.submit(request_id, queue, ticket, fields, inputs=inputs, start=start)
            except StateStoreDown:
                # It would hold its slot until the lease ends.
                self._unanswered.add((request_id, start.mark))
                raise
            if claim is not None:
                await self._start(claim, replica)
        return stored

    async def _give_back(self, submit: tuple[str, str]) -> None:
        await self._state.give_back(*submit, self._config.max_attempts)

    async def _start(self, claim: Claim, replica: Replica) -> None:
        task = asyncio.create_task(self._run(claim.request_id, self._lifecycle.run(claim, replica)))
        # Once it runs, it counts itself in, and what cancels it finds it at work. Before, nothing of it would ever run.
        await asyncio.sleep(0)
        self._running[claim.request_id] = task
        if claim.request_id in self._aborted_early:
            self._aborted_early.remove(claim.request_id)
            self.cancel(claim.request_id)
        elif self._stopping:
            task.cancel()

    async def _claim_all(self) -> None:
        self._aborted_early.clear()
        # Replicas without a slot, by what Redis knows of all gateways.
        full: set[str] = set()
        while not self._stopping and (free := self._free(full)):
            claim, found = await self._claim_one(free)
            full |= found
            if not (claim.left if claim is not None else found):
                return

    async def _claim_one(self, free: Mapping[str, tuple[Replica, Offer]]) -> tuple[Claim | None, set[str]]:
        """Also returns which of the replicas turned out to be full."""
        offers = {queue: offer for queue, (_, offer) in free.items()}
        self._claiming = True
        try:
            claim = await self._state.claim(list(free), self._config.lease_s, offers)
            if claim is not None:
                await self._start(claim, free[claim.queue][0])
                # Before the next one: whether there is room for it depends on that.
                await self._lifecycle.memory.ask(types_pb2.GenerationParams.FromString(claim.record["params"]))
        finally:
            self._claiming = False
        return claim, {offer.replica_id for offer in offers.values() if offer.full}

    def _free(self, full: Collection[str] = ()) -> dict[str, tuple[Replica, Offer]]:
        """The queues that a replica may have a slot for, in the order of claiming, with the least busy such replica.

        A denoiser takes what there are free encoders for, and nothing without any; a VAE leaves what needs an
        interpolator while none is free. No queue while the store takes
        nothing, as what is made then would have to wait in memory; nor while that is full.
        """
        free: dict[str, tuple[Replica, Offer]] = {}
        if self._writes.refusal is not None or not self._lifecycle.memory.has_room:
            return free
        for stage in CLAIMED_STAGES:
            for replica in self._replicas.of_stage(stage):
                if replica.facts is None or not replica.available or replica.facts.replica_id in full:
                    continue
                component = replica.facts.component_id
                feeds = self._replicas.feeds if stage == "dit" else self._replicas.feeds_of_vae
                offer = replica.offer(feeds(component))
                if offer.feeds is None or offer.feeds:
                    free.setdefault(queue_key(stage, component), (replica, offer))
        return free

    async def _run(self, request_id: str, work: object) -> None:
        try:
            await work  # type: ignore[misc]
        finally:
            if self._running.get(request_id) is asyncio.current_task():
                del self._running[request_id]
            self._wake.set()

    async def reap(self) -> None:
        """Gives expired leases back and sweeps the queues, for ever. Any gateway may do it."""
        lost = error_to_proto(DeviceLost("the gateway that ran the request went silent")).SerializeToString()
        before: set[str] = set()
        while True:
            await asyncio.sleep(min(REAP_S, self._config.lease_s / 4))
            with contextlib.suppress(ServiceError):
                now = set(await self._state.expired())
                # Seen twice: when Redis comes back after an outage, owners have the time between to renew their leases.
                expired, before = now & before, now
                for request_id in expired:
                    await self._lifecycle.take_away(request_id, lost)
                await self._state.sweep()
                while self._ended:
                    await self._lifecycle.forget(self._ended.pop())

    async def stop(self) -> None:
        """Gives every claim back, with a checkpoint where there is time for one: another gateway goes on with it."""
        self._stopping = True
        self._lifecycle.hand_back()
        if self._running:
            await asyncio.wait(self._running.values(), timeout=HAND_BACK_S)
        for task in list(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
