"""What happens to a claimed request: text encoder into denoiser, latents kept, VAE, artifact, commit.

Tensor frames are relayed as the bytes they came as. A stage that breaks gives the request back to the queue; every
change of state is made under the claim's fence.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from gateway.config import GatewaySection
from gateway.replicas import Replica, Replicas
from gateway.state import TERMINAL, Claim, State, queue_key
from gateway.store import Store
from protos import dit_pb2, gateway_pb2, text_encoder_pb2, types_pb2, vae_pb2
from services.client import error_from_rpc
from services.errors import Cancelled, CorruptTensor, NotReady, Overloaded, ServiceError
from services.telemetry import internal_error, make_span, new_traceparent, request_context
from services.tensor_wire import frame_of, is_end
from services.wire import error_to_proto

log = logging.getLogger(__name__)

EVENT_PERIOD_S = 0.2


@dataclass(slots=True)
class Work:
    """A claim in work, with what its stages reported."""

    claim: Claim
    params: types_pb2.GenerationParams
    deadline_unix_s: float
    traceparent: str
    busy_s: dict[str, float] = field(default_factory=dict)
    spans: list[types_pb2.Span] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.claim.request_id

    def context(self) -> types_pb2.RequestContext:
        """For a stage's first message."""
        attempt = int(self.claim.record.get("attempt", b"1"))
        return types_pb2.RequestContext(request_id=self.request_id, fence=self.claim.fence, attempt=attempt)

    def call_options(self) -> dict[str, Any]:
        """Deadline and trace context of a stage call."""
        return {
            "timeout": max(0.001, self.deadline_unix_s - time.time()),
            "metadata": (("traceparent", new_traceparent(self.traceparent)),),
        }

    def add(self, stage: str, usage: types_pb2.StageUsage) -> None:
        """Takes a stage's usage."""
        self.busy_s[stage] = self.busy_s.get(stage, 0.0) + usage.busy_s
        self.spans.extend(usage.spans)

    def fields(self, **more: str | bytes) -> dict[str, str | bytes | float]:
        """Hash fields of a commit."""
        spans = gateway_pb2.TraceResponse(spans=self.spans).SerializeToString()
        name = "spans:" + (sorted(self.busy_s)[0] if self.busy_s else "none")
        return {f"busy:{stage}": seconds for stage, seconds in self.busy_s.items()} | {name: spans} | more


class Lifecycle:
    """Runs claims. `process` names this gateway in traces."""

    def __init__(self, state: State, replicas: Replicas, store: Store, config: GatewaySection, process: str) -> None:
        self._state = state
        self._replicas = replicas
        self._store = store
        self._config = config
        self._process = process
        self._stopping = False

    def hand_back(self) -> None:
        """From now on, work that is cancelled goes back to its queue: this gateway stops, the requests live on."""
        self._stopping = True

    def forget(self, request_id: str, state: str) -> None:
        """Clears up behind a request that is in this state now; not behind one that has another owner ("lost")."""
        if state == "done":
            self._store.drop_latents(request_id)
        elif state in TERMINAL:
            self._store.drop(request_id)

    async def run(self, claim: Claim, replica: Replica) -> None:
        """Takes a claim through its stage, and through the VAE too when one is free. Never raises, but on cancel."""
        work = self._work(claim)
        with request_context(work.request_id, work.traceparent):
            beat = asyncio.create_task(self._keep_lease(work, asyncio.current_task()))
            try:
                if claim.record.get("stage") == b"vae":
                    await self._decode(work, replica, await self._store.latents(work.request_id))
                else:
                    await self._denoise(work, replica)
            except asyncio.CancelledError:
                await asyncio.shield(self._cancelled(work))
            except ServiceError as error:
                await self._give_up(work, replica, error)
            except Exception as error:  # noqa: BLE001 - a bug fails its request, not the gateway
                await self._give_up(work, replica, internal_error(error, work.request_id))
            finally:
                beat.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await beat

    def _work(self, claim: Claim) -> Work:
        record = claim.record
        return Work(
            claim=claim,
            params=types_pb2.GenerationParams.FromString(record["params"]),
            deadline_unix_s=float(record["deadline"]),
            traceparent=record["traceparent"].decode(),
        )

    async def _denoise(self, work: Work, replica: Replica) -> None:
        start_ns = time.time_ns()
        messages: list[bytes] = []
        with replica.in_use():
            await self._run_dit(work, replica, messages)
        if not messages or not is_end_message(messages[-1]):
            raise CorruptTensor("the denoiser's stream ended before its latents were whole")
        work.spans.append(make_span("gateway.denoise", self._process, start_ns, time.time_ns()))
        await self._store.put_latents(work.request_id, messages)
        queue = queue_key("vae", self._replicas.component("vae", work.params.model))
        try:
            vae = self._replicas.choose("vae", work.params.model)
        except NotReady:
            self.forget(work.request_id, await self._state.commit(work.claim, "queued", "vae", queue, work.fields()))
            return
        fields = work.fields(queue=queue)
        work.busy_s.clear()
        work.spans.clear()
        state = await self._state.commit(work.claim, "running", "vae", "", fields)
        if state == "running":
            await self._decode(work, vae, messages)
        else:
            self.forget(work.request_id, state)

    async def _run_dit(self, work: Work, replica: Replica, latents: list[bytes]) -> None:
        failure: list[ServiceError] = []
        method: Any = replica.channel.stream_stream("/lightloom.v1.Dit/Denoise")
        call = method(self._conditions(work, failure), **work.call_options())
        progress = Progress(self._state, work.claim, self._config.lease_s)
        try:
            async for message in call:
                if frame_of(message) is not None:
                    latents.append(message)
                    continue
                response = dit_pb2.DenoiseResponse.FromString(message)
                match response.WhichOneof("kind"):
                    case "step":
                        await progress.step(response.step)
                    case "preview":
                        await progress.preview(response.preview)
                    case "bundle":
                        latents.clear()
                    case "usage":
                        work.add("dit", response.usage)
        except grpc.aio.AioRpcError as error:
            raise (failure[0] if failure else error_from_rpc(error)) from error
        except asyncio.CancelledError:
            call.cancel()
            if failure:
                raise failure[0] from None
            raise
        finally:
            await progress.close()

    async def _conditions(self, work: Work, failure: list[ServiceError]) -> AsyncIterator[bytes]:
        """The denoiser's request stream: start, embeddings, image latents. An error is left in `failure`."""
        edit = bool(work.params.inputs)
        start = dit_pb2.DenoiseStart(context=work.context(), params=work.params, num_bundles=1 + edit)
        del start.params.inputs[:]
        fit = self._replicas.fit(work.params.model) if work.params.preview_every else None
        if fit is not None:
            start.latent_rgb_fit.CopyFrom(fit)
        yield dit_pb2.DenoiseRequest(start=start).SerializeToString()
        try:
            async for message in self._encode("text_encoder", "lightloom.v1.TextEncoder", work):
                yield message
            if edit:
                async for message in self._encode("vae", "lightloom.v1.Vae", work):
                    yield message
        except ServiceError as error:
            failure.append(error)
            raise

    async def _encode(self, stage: str, service: str, work: Work) -> AsyncIterator[bytes]:
        """Frames of an Encode call, as they come."""
        replica = self._replicas.choose(stage, work.params.model)
        request = text_encoder_pb2.EncodeRequest(context=work.context(), params=work.params)
        method: Any = replica.channel.unary_stream(f"/{service}/Encode")
        with replica.in_use():
            try:
                async for message in method(request.SerializeToString(), **work.call_options()):
                    if frame_of(message) is not None:
                        yield message
                    else:
                        work.add(stage, text_encoder_pb2.EncodeResponse.FromString(message).usage)
            except grpc.aio.AioRpcError as failure:
                error = error_from_rpc(failure)
                if error.retryable:
                    replica.pause()
                raise error from failure

    async def _decode(self, work: Work, replica: Replica, latents: list[bytes]) -> None:
        start_ns = time.time_ns()
        artifact, data = gateway_pb2.Artifact(), bytearray()
        with replica.in_use():
            try:
                await self._run_vae(work, replica, latents, artifact, data)
            except grpc.aio.AioRpcError as error:
                raise error_from_rpc(error) from error
        work.spans.append(make_span("gateway.decode", self._process, start_ns, time.time_ns()))
        stored_ns = time.time_ns()
        artifact.url = f"/v1/requests/{work.request_id}/content"
        await self._store.put(work.request_id, bytes(data), artifact)
        work.spans.append(make_span("gateway.store", self._process, stored_ns, time.time_ns()))
        fields = work.fields(artifact=artifact.SerializeToString())
        self.forget(work.request_id, await self._state.commit(work.claim, "done", "vae", "", fields))

    async def _run_vae(
        self, work: Work, replica: Replica, latents: list[bytes], artifact: gateway_pb2.Artifact, data: bytearray
    ) -> None:
        start = vae_pb2.DecodeStart(context=work.context(), params=work.params)
        del start.params.inputs[:]

        async def requests() -> AsyncIterator[bytes]:
            yield vae_pb2.DecodeRequest(start=start).SerializeToString()
            for message in latents:
                yield message

        expected = -1
        method: Any = replica.channel.stream_stream("/lightloom.v1.Vae/Decode")
        async for message in method(requests(), **work.call_options()):
            response = vae_pb2.DecodeResponse.FromString(message)
            match response.WhichOneof("kind"):
                case "media":
                    header = response.media
                    expected = header.nbytes
                    artifact.mime, artifact.width, artifact.height = header.mime, header.width, header.height
                    artifact.num_frames, artifact.fps = header.num_frames, header.fps
                case "chunk":
                    data += response.chunk.data
                case "usage":
                    work.add("vae", response.usage)
        if len(data) != expected:
            raise CorruptTensor(f"the VAE announced {expected} bytes and sent {len(data)}")

    async def _give_up(self, work: Work, replica: Replica, error: ServiceError) -> None:
        log.warning("%s at %s: %s", error.reason, replica.address, error.message)
        if not error.retryable or time.time() > work.deadline_unix_s:
            await self._end(work, "failed", error)
            return
        replica.pause()
        # A full or starting replica is nobody's fault; only what may be the request's own doing counts.
        counts = not isinstance(error, (NotReady, Overloaded))
        detail = error_to_proto(error).SerializeToString()
        await self._requeue(work, counts, detail)

    async def _end(self, work: Work, state: str, error: ServiceError) -> None:
        detail = error_to_proto(error).SerializeToString()
        with contextlib.suppress(ServiceError):
            # If Redis is away now, the lease runs out and the reaper ends the request.
            self.forget(work.request_id, await self._state.commit(work.claim, state, "", "", work.fields(error=detail)))

    async def _cancelled(self, work: Work) -> None:
        if self._stopping:
            leaving = NotReady("the gateway that ran the request stopped")
            await self._requeue(work, False, error_to_proto(leaving).SerializeToString())
        else:
            await self._end(work, "cancelled", Cancelled("the request was aborted"))

    async def _requeue(self, work: Work, counts: bool, detail: bytes) -> None:
        fence, attempts = work.claim.fence, self._config.max_attempts
        with contextlib.suppress(ServiceError):
            self.forget(work.request_id, await self._state.requeue(work.request_id, fence, attempts, counts, detail))

    async def _keep_lease(self, work: Work, task: asyncio.Task[None] | None) -> None:
        """Beats until cancelled; a lost lease or an abort that was missed cancels the work."""
        while True:
            await asyncio.sleep(self._config.lease_s / 3)
            try:
                state = await self._state.beat(work.claim, self._config.lease_s)
            except ServiceError:
                continue
            if state in ("lost", "cancelling") and task is not None:
                task.cancel()
                return


class Progress:
    """Step events at no more than five a second; the first and the last always go out."""

    def __init__(self, state: State, claim: Claim, lease_s: float) -> None:
        self._state = state
        self._claim = claim
        self._lease_s = lease_s
        self._sent_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def step(self, event: dit_pb2.StepEvent) -> None:
        """Notes a step."""
        now_s = time.monotonic()
        if event.step not in (1, event.total) and now_s - self._sent_s < EVENT_PERIOD_S:
            return
        self._sent_s = now_s
        progress = gateway_pb2.StepProgress(
            step=event.step, total=event.total, sigma=event.sigma, seconds=event.seconds
        )
        self._send("step", progress.SerializeToString(), event.step, event.total)

    async def preview(self, media: types_pb2.Media) -> None:
        """Passes a preview on."""
        self._send("preview", media.SerializeToString(), 0, 0)

    def _send(self, kind: str, payload: bytes, step: int, total: int) -> None:
        # Progress is not worth a stall of the stream: Redis is told beside it, in order of starting.
        task = asyncio.create_task(self._beat(kind, payload, step, total))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _beat(self, kind: str, payload: bytes, step: int, total: int) -> None:
        with contextlib.suppress(ServiceError):
            await self._state.beat(self._claim, self._lease_s, kind=kind, payload=payload, step=step, total=total)

    async def close(self) -> None:
        """Waits for what is under way."""
        await asyncio.gather(*self._tasks)


def is_end_message(message: bytes) -> bool:
    """Whether a relayed message closes a bundle."""
    frame = frame_of(message)
    return frame is not None and is_end(frame)
