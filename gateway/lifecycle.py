"""What happens to a claimed request: text encoder into denoiser, latents kept, VAE and interpolator, artifact, commit.

Where the experts of a model lie in denoisers of their own, a request waits for the next one with its checkpoint.

Tensor frames are relayed as the bytes they came as. A stage that breaks gives the request back to the queue; every
change of state is made under the claim's fence.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable

from gateway.checkpoints import Checkpoint, Checkpoints, drop_between_stages
from gateway.config import GatewaySection
from gateway.decode import Decode
from gateway.memory import Memory
from gateway.records import TERMINAL, Claim, queue_key
from gateway.replica import Replica
from gateway.replicas import Replicas
from gateway.stage_calls import Feed, Latents, denoise, refused
from gateway.state import State
from gateway.store import Store, artifact_name
from gateway.to_its_end import to_its_end
from gateway.work import Progress, Work, kept_in
from protos import dit_pb2
from services.errors import (
    ArtifactStoreDown,
    ArtifactStoreFull,
    Cancelled,
    CorruptTensor,
    DeadlineExceeded,
    DeviceLost,
    InvalidRequest,
    NotReady,
    Overloaded,
    ServiceError,
    StageMismatch,
)
from services.telemetry import internal_error, make_span, request_context
from services.wire import error_to_proto

log = logging.getLogger(__name__)

LATENTS = dit_pb2.BundleStart.KIND_LATENTS


class Lifecycle:
    """Runs claims. `process` names this gateway in traces."""

    def __init__(self, state: State, replicas: Replicas, store: Store, config: GatewaySection, process: str) -> None:
        self.memory = Memory(config.max_held_bytes, state)
        # Requests of ours whose abort was heard here.
        self.aborted: set[str] = set()
        self._state = state
        self._replicas = replicas
        self._store = store
        self._config = config
        self._process = process
        self._feeds: set[Feed] = set()
        self._releasing: set[asyncio.Task[None]] = set()
        self._stopping = False

    def hand_back(self) -> None:
        """This gateway stops, its requests live on: denoisers give them back with a checkpoint, soon.

        Work that is cancelled from now on goes back to its queue.
        """
        self._stopping = True
        for feed in self._feeds:
            feed.ask_checkpoint(stop=True)

    async def take_away(self, request_id: str, error: bytes) -> None:
        """Gives back a request whose owner went silent, and clears up what that one left."""
        # Read before: then nothing of it is a later owner's.
        checkpoints = await self._listed(self._store.checkpoints_of(request_id))
        before = await self._state.get(request_id)
        slots, before_fence = before.get("slots", b"").decode(), int(before.get("fence", b"0"))
        state = await self._state.requeue(request_id, None, self._config.max_attempts, True, error)
        if state != "lost":
            log.warning("lease of %s expired: it is %s now", request_id, state)
        # Lost or not: if the answer to a first try was lost, the second one finds no lease.
        record = await self._state.get(request_id)
        fence = int(record.get("fence", b"0"))
        self._release(slots.rpartition(":")[2], request_id, fence)
        own = artifact_name(request_id, fence)
        if before_fence != fence:
            # By its name: the store has files of very many requests. What older owners left goes with the sweep.
            await self._store.drop(artifact_name(request_id, before_fence))
        noted = {kept.name for kept in kept_in(record)}
        if record.get("state", b"").decode() in TERMINAL:
            useless = {request_id, *checkpoints} | noted
        else:
            # It may have died between writing one and noting it.
            useless = {name for name in checkpoints if not name.startswith(f"{own}.")} - noted
        await self._store.drop_latents(*useless)

    def _release(self, replica_id: str, request_id: str, fence: int) -> None:
        """Beside the reaper, which must not wait for a replica: its owner's stream may be silent for long."""
        releasing = asyncio.create_task(self._replicas.release(replica_id, request_id, fence))
        self._releasing.add(releasing)
        releasing.add_done_callback(self._releasing.discard)

    async def _listed(self, names: Awaitable[list[str]]) -> list[str]:
        try:
            return await names
        except ServiceError:
            # The store is away: the request need not wait for it, and the sweep finds what stays there.
            return []

    async def forget(self, request_id: str) -> None:
        """Clears up what a request that has ended left between its stages."""
        await drop_between_stages(self._state, self._store, request_id)

    async def _settle(self, work: Work, state: str) -> None:
        """Clears up behind a request that is in this state now, as far as nobody needs it any more."""
        kept = state in ("done", "running")
        if state == "lost":
            # It may have ended, even with our result, if the answer to our commit was lost.
            record = await self._state.get(work.request_id)
            kept = record.get("file") == work.artifact_name.encode()
            state = record["state"].decode() if record else "expired"
        if state in TERMINAL:
            await self._store.drop_latents(work.request_id)
            await self._drop_checkpoints(work)
        if not kept:
            await self._store.drop(work.artifact_name)

    async def _drop_checkpoints(self, work: Work) -> None:
        names = [checkpoint.name for checkpoint in work.checkpoints]
        work.checkpoints.clear()
        await self._store.drop_latents(*names)

    async def run(self, claim: Claim, replica: Replica) -> None:
        """Takes a claim through its stage, and through the VAE too when one is free. Never raises, but on cancel."""
        work = Work.of(claim)
        nbytes = int(claim.record.get("bytes", b"0"))
        with request_context(work.request_id, work.traceparent), self.memory.held_by(work.params, nbytes):
            beat = asyncio.create_task(self._keep_lease(work, asyncio.current_task()))
            try:
                await self._run_stage(work, replica)
            except asyncio.CancelledError:
                # A call that ended by itself, as when its channel is closed, may be the request's own doing.
                task = asyncio.current_task()
                await to_its_end(self._cancelled(work, counts=task is not None and not task.cancelling()))
            finally:
                self.aborted.discard(work.request_id)
                beat.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await beat

    async def _run_stage(self, work: Work, replica: Replica) -> None:
        try:
            if work.claim.record.get("stage") == b"vae":
                await self._decode_stored(work, replica)
            else:
                await self._denoise(work, replica)
        except ServiceError as error:
            await self._give_up(work, replica, error)
        except Exception as error:  # noqa: BLE001 - a bug fails its request, not the gateway
            await self._give_up(work, replica, internal_error(error, work.request_id))

    async def _denoise(self, work: Work, replica: Replica) -> None:
        start_ns = time.time_ns()
        latents, decode = Latents(), None
        progress = Progress(self._state, work.claim, self._config.lease_s)
        checkpoints = Checkpoints(self._state, self._store, work, self._config.checkpoint_every_s, self._config.lease_s)
        if work.params.inputs:
            work.take_inputs(await self._state.inputs(work.request_id))
        resume = await checkpoints.newest()
        feed = self._feed(work, resume)
        try:
            decode = await self._follow(work, replica, feed, latents, progress, checkpoints)
            work.spans.append(make_span("gateway.denoise", self._process, start_ns, time.time_ns()))
            await progress.close()
            if checkpoints.onward is not None:
                await self._hand_on(work, replica, checkpoints, checkpoints.onward)
            else:
                await self._hand_over(work, latents, decode)
        except InvalidRequest:
            if resume is None:
                raise
            # What is different from the first time is the checkpoint.
            await checkpoints.forget()
            raise DeviceLost("the denoiser refused the checkpoint: the request begins anew") from None
        finally:
            self._feeds.discard(feed)
            feed.close()
            await progress.close()
            if decode is not None:
                await decode.close()
            # Whoever goes on with the request reads them from the store, while an error may still hold this frame.
            latents.messages.clear()

    def _feed(self, work: Work, resume: Checkpoint | None) -> Feed:
        model = work.params.model
        stages = ("text_encoder", "vae") if work.params.inputs else ("text_encoder",)
        encoders = [self._replicas.choose(stage, model) for stage in stages]
        fit = self._replicas.fit(model) if work.params.preview_every else None
        feed = Feed(work, encoders, fit, resume)
        self._feeds.add(feed)
        if self._stopping:
            feed.ask_checkpoint(stop=True)
        return feed

    async def _follow(
        self,
        work: Work,
        replica: Replica,
        feed: Feed,
        latents: Latents,
        progress: Progress,
        checkpoints: Checkpoints,
    ) -> Decode | None:
        """Follows a denoiser until the latents are whole; returns the VAE's call that has begun meanwhile."""
        decode: Decode | None = None
        try:
            async with contextlib.aclosing(denoise(work, replica, feed, latents)) as responses:
                async for response in responses:
                    if isinstance(response, Checkpoint):
                        await checkpoints.keep(response)
                        continue
                    match response.WhichOneof("kind"):
                        case "step":
                            step, total = response.step.step, response.step.total
                            progress.step(response.step)
                            if checkpoints.due(step, total):
                                feed.ask_checkpoint()
                            if decode is None and step >= total - 1:
                                decode = self._decode_ahead(work, latents)
                        case "preview":
                            progress.preview(response.preview)
                        case "bundle" if decode is None and response.bundle.kind == LATENTS:
                            decode = self._decode_ahead(work, latents)
                        case "usage":
                            work.add("dit", response.usage)
                            replica.took(response.usage, work.params)
        except BaseException:
            if decode is not None:
                await decode.close()
            raise
        return decode

    def _decode_ahead(self, work: Work, latents: Latents) -> Decode | None:
        """A VAE call that opens during the last step, if a VAE is free now: it decodes before the latents are kept."""
        try:
            return self._decode(work, self._replicas.choose("vae", work.params.model), latents)
        except NotReady:
            return None

    def _decode(self, work: Work, vae: Replica, latents: Latents) -> Decode:
        interpolator = self._interpolator(work)
        return Decode(work, vae, latents, Progress(self._state, work.claim, self._config.lease_s), interpolator)

    def _interpolator(self, work: Work) -> Replica | None:
        """For a request that wants one.

        Raises:
            NotReady: none is free now.
        """
        wanted = work.params.enable_frame_interpolation
        return self._replicas.choose("interpolation", work.params.model) if wanted else None

    async def _hand_on(self, work: Work, replica: Replica, checkpoints: Checkpoints, checkpoint: Checkpoint) -> None:
        """Keeps the checkpoint and moves the request to the queue of the expert that takes its next step."""
        model, experts = work.params.model, self._replicas.experts(work.params.model)
        before, after = work.claim.record.get("expert", b"").decode() or next(iter(experts), ""), checkpoint.expert
        if after not in experts or after == before:
            raise refused(replica, CorruptTensor(f"the denoiser handed on to an expert {after!r}, which is not there"))
        more = {"expert": after, "step": str(checkpoint.step)}
        if experts.index(after) < experts.index(before):
            lost = CorruptTensor(f"the checkpoint with which the expert {before} was to go on is lost")
            more["denoised_again"] = self._once_more(work, lost)
        try:
            queue = queue_key("dit", self._replicas.component("dit", model, after))
        except NotReady as error:
            raise refused(replica, error) from None
        fields = work.fields(**more, **await checkpoints.hand_on(checkpoint))
        await self._settle(work, await self._state.commit(work.claim, "queued", "dit", queue, fields))

    async def _hand_over(self, work: Work, latents: Latents, decode: Decode | None) -> None:
        """Keeps the latents and moves the request on to its VAE: the call that runs, or the queue."""
        self.memory.learn(work.params, latents.nbytes)
        await self._store.put_latents(work.request_id, latents.messages, work.deadline_s)
        await self.memory.tell(work.params)
        queue = queue_key("vae", self._replicas.component("vae", work.params.model))
        fields = work.fields(queue=queue)
        work.busy_s.clear()
        work.spans.clear()
        target, stays_here = ("queued", queue) if decode is None else ("running", "")
        state = await self._state.commit(work.claim, target, "vae", stays_here, fields)
        if state == target:
            await self._drop_checkpoints(work)
        if decode is not None and state == "running":
            await self._finish(work, decode)
        else:
            await self._settle(work, state)

    async def _decode_stored(self, work: Work, replica: Replica) -> None:
        try:
            latents = await self._store.latents(work.request_id)
        except CorruptTensor as error:
            await self._denoise_again(work, error)
            return
        kept = Latents(latents, whole=True)
        self.memory.learn(work.params, kept.nbytes)
        decode = self._decode(work, replica, kept)
        try:
            await self._finish(work, decode)
        finally:
            await decode.close()

    async def _denoise_again(self, work: Work, error: CorruptTensor) -> None:
        """Back to the denoiser's queue: its latents are lost."""
        times = self._once_more(work, error)
        queue = queue_key("dit", self._replicas.component("dit", work.params.model))
        fields = work.fields(queue=queue, denoised_again=times, step="0", frames="0", expert="")
        await self._settle(work, await self._state.commit(work.claim, "queued", "dit", queue, fields))

    def _once_more(self, work: Work, error: CorruptTensor) -> str:
        """How often it will have been denoised again. Where that happens again and again, the request fails."""
        times = int(work.claim.record.get("denoised_again", b"0")) + 1
        if times >= self._config.max_attempts:
            raise error
        log.warning("%s is denoised again: %s", work.request_id, error.message)
        return str(times)

    async def _finish(self, work: Work, decode: Decode) -> None:
        """Media to the store, then DONE."""
        data = await decode.media()
        start_ns = time.time_ns()
        put = self._store.put(work.artifact_name, data, decode.artifact, work.deadline_s, decode.digests)
        storing = asyncio.create_task(put)
        try:
            for stage, usage in (await decode.ended()).items():
                work.add(stage, usage)
            work.spans.append(make_span("gateway.decode", self._process, decode.start_unix_ns, time.time_ns()))
        except BaseException:
            # Nobody wants it any more: a store that is full may keep it waiting until the request's deadline.
            storing.cancel()
            await to_its_end(asyncio.gather(storing, return_exceptions=True))
            raise
        await storing
        work.spans.append(make_span("gateway.store", self._process, start_ns, time.time_ns()))
        fields = work.fields(artifact=decode.artifact.SerializeToString(), file=work.artifact_name)
        await self._settle(work, await self._state.commit(work.claim, "done", "vae", "", fields))

    async def _give_up(self, work: Work, replica: Replica, error: ServiceError) -> None:
        if isinstance(error, InvalidRequest) and not error.param:
            error = StageMismatch(f"the stages of model {work.params.model!r} do not fit each other: {error.message}")
        log.warning("%s at %s: %s", error.reason, replica.address, error.message)
        if not error.retryable or time.monotonic() > work.deadline_s:
            await self._end(work, "expired" if isinstance(error, DeadlineExceeded) else "failed", error)
            return
        # A full or starting replica is nobody's fault; only what may be the request's own doing counts.
        counts = not isinstance(error, (ArtifactStoreDown, ArtifactStoreFull, NotReady, Overloaded))
        detail = error_to_proto(error).SerializeToString()
        await self._requeue(work, counts, detail)

    async def _end(self, work: Work, state: str, error: ServiceError) -> str:
        """Returns the state that it has now; "" when Redis is away: the lease runs out, and the reaper takes it."""
        detail = error_to_proto(error).SerializeToString()
        with contextlib.suppress(ServiceError):
            ended = await self._state.commit(work.claim, state, "", "", work.fields(error=detail))
            await self._settle(work, ended)
            return ended
        return ""

    async def _cancelled(self, work: Work, *, counts: bool) -> None:
        """An abort, a gateway that stops, a call that ended, or a lease that seemed lost: but for an abort, it goes on.

        Args:
            counts: as an attempt, if it goes on.
        """
        aborted = Cancelled("the request was aborted")
        if not self._stopping:
            ended = await self._end(work, "cancelled", aborted)
            if ended == "running" and work.request_id in self.aborted:
                # A failover has lost the abort, not the word of it.
                with contextlib.suppress(ServiceError):
                    await self._state.abort(work.request_id)
                ended = await self._end(work, "cancelled", aborted)
            if ended != "running":
                return
            log.warning("gives %s back: nobody has aborted it", work.request_id)
        leaving = NotReady("the gateway that ran the request let go of it")
        await self._requeue(work, counts, error_to_proto(leaving).SerializeToString())

    async def _requeue(self, work: Work, counts: bool, detail: bytes) -> None:
        fence, attempts = work.claim.fence, self._config.max_attempts
        with contextlib.suppress(ServiceError):
            await self._settle(work, await self._state.requeue(work.request_id, fence, attempts, counts, detail))

    async def _keep_lease(self, work: Work, task: asyncio.Task[None] | None) -> None:
        """Beats until cancelled; a lost lease or an abort that was missed cancels the work."""
        pause_s = self._config.lease_s / 3
        while True:
            await asyncio.sleep(pause_s)
            try:
                state = await self._state.beat(work.claim, self._config.lease_s)
            except ServiceError:
                # Redis is away. When it is back, the lease must be renewed before a reaper takes it for abandoned.
                pause_s = 0.0
                continue
            pause_s = self._config.lease_s / 3
            if state in ("lost", "cancelling") and task is not None:
                task.cancel()
                return
