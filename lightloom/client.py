"""The Python client: `Client` for scripts, `AsyncClient` for services. gRPC to a gateway, no torch.

with Client("127.0.0.1:8081") as client:
    client.generate("a green star on a black background", seed=7).save("star.png")
"""

from __future__ import annotations

import asyncio
import contextlib
import mimetypes
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc

from protos import gateway_pb2, gateway_pb2_grpc, types_pb2
from services.client import connect, error_from_rpc
from services.config import TlsSection, environment
from services.errors import Cancelled, Code, Internal, InvalidRequest, ServiceError
from services.request import GenerationParams, Media, check_interpolation, interpolated_frames, open_params, resolve
from services.wire import (
    error_from_proto,
    interpolation_limits_from_proto,
    limits_from_proto,
    params_to_proto,
)

T = TypeVar("T")
CALL_TIMEOUT_S = 30.0
# How often a clip that is being decoded is asked for its frames.
FRAMES_EVERY_S = 0.5
# For so long, a call of `generate` whose gateway has gone looks for another one.
RESUME_S = 30.0
RESUME_PAUSE_S = 0.2
_TERMINAL = ("done", "failed", "cancelled", "expired")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a request is: its state, steps done of `total`, and a preview picture when one came.

    After the last step of a clip, `frames` of `total_frames` are made: decoded, and interpolated if that is wanted.
    """

    request_id: str
    state: str
    step: int = 0
    total: int = 0
    preview: bytes = field(default=b"", repr=False)
    frames: int = 0
    total_frames: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request. `busy_s` is what each stage's rank spent on it, in seconds; `fps` counts for clips only."""

    request_id: str
    mime: str
    width: int
    height: int
    seed: int
    busy_s: dict[str, float]
    data: bytes = field(repr=False)
    num_frames: int = 1
    fps: float = 0.0

    def save(self, path: str | Path) -> Path:
        """Writes the bytes.

        Raises:
            InvalidRequest: the name says another format.
        """
        target = Path(path)
        # Of WAV, it knows the type by an older name.
        named = (mimetypes.guess_type(target.name)[0] or "").replace("audio/x-", "audio/")
        if named and self.mime and named != self.mime:
            raise InvalidRequest(f"the result is {self.mime}, and {target.name!r} says {named}", param="output_format")
        target.write_bytes(self.data)
        return target


class AsyncClient:
    """A connection to a gateway. Use it as an async context manager.

    Every method raises ServiceErrors (services/errors.py): the reason, what was wrong, what is allowed.

    Args:
        address: host:port of its gRPC front; of several gateways `ipv4:HOST:PORT,HOST:PORT` or `dns:///NAME:PORT`:
            when one goes away, what it was waited for at comes from another.
        api_key: goes with every call; default: LIGHTLOOM_API_KEY, if it is set.
        tls: the certificates to use; None: plain text.

    Raises:
        StartupError: a certificate that cannot be used.
    """

    def __init__(
        self, address: str, *, api_key: str | None = None, tls: TlsSection | None = None, timeout_s: float = 3600.0
    ) -> None:
        self._channel = connect(address, tls=tls)
        self._stub: Any = gateway_pb2_grpc.GatewayStub(self._channel)
        self._timeout_s = timeout_s
        key = environment("LIGHTLOOM_API_KEY") if api_key is None else api_key
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; requests of `generate` that run are aborted."""
        await self._channel.close()

    async def generate(
        self,
        prompt: str,
        *,
        model: str = "",
        on_progress: Callable[[Progress], None] | None = None,
        images: Sequence[str | Path | bytes | Media] = (),
        **options: Any,
    ) -> Result:
        """Makes a picture or clip and waits for it; cancelling the task aborts the request.

        Args:
            on_progress: called with every event.
            images: input pictures and clips, as files or bytes; as `Media`, those with another role than "image".
            options: fields of services.request.GenerationParams: width, height, steps, seed, guidance, ...
        """
        inputs = tuple(_media(image) for image in images)
        params = open_params(**{"model": model, "prompt": prompt, "inputs": inputs, **options})
        request = gateway_pb2.GenerateRequest(params=await self._message(params), inline_artifact=True)
        status, data = gateway_pb2.RequestStatus(), bytearray()
        frames: asyncio.Task[None] | None = None
        try:
            async for event in self._to_its_end(request):
                kind = event.WhichOneof("event")
                _raise_of(frames)
                if kind == "status":
                    status = event.status
                    if frames is not None and _state(status.state) in _TERMINAL:
                        frames.cancel()
                    # The pieces come behind it, and from the first on when they come again.
                    data.clear()
                elif kind == "chunk":
                    data += event.chunk.data
                    continue
                if on_progress is not None:
                    on_progress(progress := _progress(event, status))
                    if frames is None and 0 < progress.total == progress.step and status.params.num_frames > 1:
                        frames = asyncio.create_task(self._tell_frames(status, on_progress))
            _raise_of(frames)
        finally:
            if frames is not None:
                frames.cancel()
        return _result(status, bytes(data))

    async def _tell_frames(self, status: gateway_pb2.RequestStatus, on_progress: Callable[[Progress], None]) -> None:
        """Looks how many there are, until it is cancelled: frames are no events."""
        params = status.params
        total = interpolated_frames(params) if params.enable_frame_interpolation else params.num_frames
        while True:
            await asyncio.sleep(FRAMES_EVERY_S)
            with contextlib.suppress(ServiceError):
                status = await self.get(status.request_id)
            if status.frames:
                state, steps = _state(status.state), status.total_steps
                on_progress(Progress(status.request_id, state, steps, steps, frames=status.frames, total_frames=total))

    async def _to_its_end(self, request: gateway_pb2.GenerateRequest) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        """All events of a request; when its gateway goes away, the rest from any, by Watch.

        If that happens behind the last status, among the pieces of the artifact, that status comes again.
        """
        loop = asyncio.get_running_loop()
        call = self._stub.Generate(request, timeout=self._timeout_s, metadata=self._metadata)
        end_s, patience_end_s = loop.time() + self._timeout_s, 0.0
        watch = gateway_pb2.WatchRequest(inline_artifact=request.inline_artifact)
        resumed = False
        try:
            while True:
                try:
                    async for event in self._stream(call):
                        watch.request_id, patience_end_s = event.request_id, 0.0
                        if event.event_id and event.status.state != gateway_pb2.REQUEST_STATE_DONE:
                            watch.last_event_id = event.event_id
                        yield event
                    return
                except ServiceError as error:
                    patience_end_s = patience_end_s or loop.time() + RESUME_S
                    if error.code is not Code.UNAVAILABLE or not watch.request_id or loop.time() > patience_end_s:
                        raise
                resumed = True
                await asyncio.sleep(RESUME_PAUSE_S)
                call = self._stub.Watch(watch, timeout=end_s - loop.time(), metadata=self._metadata)
        except asyncio.CancelledError:
            # Who leaves Generate aborts; of Watch, gateways cannot know.
            if resumed:
                await asyncio.shield(self.abort(watch.request_id))
            raise

    async def submit(self, prompt: str, *, model: str = "", idempotency_key: str = "", **options: Any) -> str:
        """Starts a request that goes on without us; returns its id."""
        params = open_params(model=model, prompt=prompt, **options)
        request = gateway_pb2.GenerateRequest(
            params=await self._message(params), detach=True, idempotency_key=idempotency_key
        )
        call = self._stub.Generate(request, timeout=self._timeout_s, metadata=self._metadata)
        async for event in self._stream(call):
            call.cancel()
            return str(event.request_id)
        raise Internal("the gateway accepted the request without an id")

    async def watch(self, request_id: str, last_event_id: str = "") -> AsyncIterator[Progress]:
        """Follows a request, from any gateway, until it ends."""
        request = gateway_pb2.WatchRequest(request_id=request_id, last_event_id=last_event_id)
        status = gateway_pb2.RequestStatus()
        async for event in self._stream(self._stub.Watch(request, timeout=self._timeout_s, metadata=self._metadata)):
            if event.WhichOneof("event") == "status":
                status = event.status
            yield _progress(event, status)

    async def get(self, request_id: str) -> gateway_pb2.RequestStatus:
        """A request's whole status."""
        answer = await self._call(self._stub.Get, gateway_pb2.GetRequest(request_id=request_id))
        return answer.status  # type: ignore[no-any-return]

    async def list(self, limit: int = 100) -> Sequence[gateway_pb2.RequestStatus]:
        """The newest requests."""
        answer = await self._call(self._stub.List, gateway_pb2.ListRequest(limit=limit))
        return answer.requests  # type: ignore[no-any-return]

    async def abort(self, request_id: str) -> str:
        """Aborts; returns the state: cancelled, cancelling, or how the request had ended."""
        answer = await self._call(self._stub.Abort, gateway_pb2.AbortRequest(request_id=request_id))
        return _state(answer.state)

    async def models(self) -> Sequence[gateway_pb2.ModelInfo]:
        """Models with their limits and replicas."""
        answer = await self._call(self._stub.Models, gateway_pb2.ModelsRequest())
        return answer.models  # type: ignore[no-any-return]

    async def trace(self, request_id: str) -> Sequence[types_pb2.Span]:
        """One request's timeline over all processes."""
        answer = await self._call(self._stub.Trace, gateway_pb2.TraceRequest(request_id=request_id))
        return answer.spans  # type: ignore[no-any-return]

    async def _message(self, params: GenerationParams) -> types_pb2.GenerationParams:
        try:
            return params_to_proto(params)
        except InvalidRequest:
            # No message holds a negative number, so no gateway can refuse it: what is allowed is said here.
            answer = await self._call(self._stub.Models, gateway_pb2.ModelsRequest())
            for info in answer.models:
                if info.name == params.model or (not params.model and len(answer.models) == 1):
                    # A word in a number's place is no matter of limits.
                    with contextlib.suppress(TypeError):
                        resolved = resolve(params, limits_from_proto(info.limits), seed=0)
                        if resolved.enable_frame_interpolation and answer.HasField("interpolation_limits"):
                            check_interpolation(resolved, interpolation_limits_from_proto(answer.interpolation_limits))
            raise

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=CALL_TIMEOUT_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None

    async def _stream(self, call: Any) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        try:
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None


class Client:
    """The same for code without an event loop. Use it as a context manager."""

    def __init__(
        self, address: str, *, api_key: str | None = None, tls: TlsSection | None = None, timeout_s: float = 3600.0
    ) -> None:
        self._runner = asyncio.Runner()

        async def open_client() -> AsyncClient:
            return AsyncClient(address, api_key=api_key, tls=tls, timeout_s=timeout_s)

        self._client = self._runner.run(open_client())

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._run(self._client.close())
        self._runner.close()

    def generate(
        self,
        prompt: str,
        *,
        model: str = "",
        on_progress: Callable[[Progress], None] | None = None,
        images: Sequence[str | Path | bytes | Media] = (),
        **options: Any,
    ) -> Result:
        """As AsyncClient.generate; Ctrl-C aborts the request."""
        return self._run(self._client.generate(prompt, model=model, on_progress=on_progress, images=images, **options))

    def submit(self, prompt: str, *, model: str = "", idempotency_key: str = "", **options: Any) -> str:
        """As AsyncClient.submit."""
        return self._run(self._client.submit(prompt, model=model, idempotency_key=idempotency_key, **options))

    def get(self, request_id: str) -> gateway_pb2.RequestStatus:
        """As AsyncClient.get."""
        return self._run(self._client.get(request_id))

    def list(self, limit: int = 100) -> Sequence[gateway_pb2.RequestStatus]:
        """As AsyncClient.list."""
        return self._run(self._client.list(limit))

    def abort(self, request_id: str) -> str:
        """As AsyncClient.abort."""
        return self._run(self._client.abort(request_id))

    def models(self) -> Sequence[gateway_pb2.ModelInfo]:
        """As AsyncClient.models."""
        return self._run(self._client.models())

    def trace(self, request_id: str) -> Sequence[types_pb2.Span]:
        """As AsyncClient.trace."""
        return self._run(self._client.trace(request_id))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)


def _progress(event: gateway_pb2.GenerateResponse, status: gateway_pb2.RequestStatus) -> Progress:
    kind = event.WhichOneof("event")
    step, total = (event.step.step, event.step.total) if kind == "step" else (status.step, status.total_steps)
    preview = event.preview.data if kind == "preview" else b""
    return Progress(event.request_id, _state(status.state), step, total, preview)


def _raise_of(task: asyncio.Task[None] | None) -> None:
    """What a task has failed with, if it has."""
    if task is not None and task.done() and not task.cancelled():
        task.result()


def _result(status: gateway_pb2.RequestStatus, data: bytes) -> Result:
    if status.state != gateway_pb2.REQUEST_STATE_DONE:
        raise _failure(status)
    artifact = status.artifact
    return Result(
        request_id=status.request_id,
        mime=artifact.mime,
        width=artifact.width,
        height=artifact.height,
        seed=status.params.seed,
        busy_s=dict(status.busy_s),
        data=data,
        num_frames=artifact.num_frames,
        fps=artifact.fps,
    )


def _failure(status: gateway_pb2.RequestStatus) -> ServiceError:
    if status.HasField("error"):
        return error_from_proto(status.error)
    if status.state == gateway_pb2.REQUEST_STATE_CANCELLED:
        return Cancelled("the request was aborted", request_id=status.request_id)
    return Internal(f"the request ended as {_state(status.state)}", request_id=status.request_id)


def _state(state: gateway_pb2.RequestState) -> str:
    return gateway_pb2.RequestState.Name(state).removeprefix("REQUEST_STATE_").lower()


def _media(image: str | Path | bytes | Media) -> Media:
    if isinstance(image, Media):
        return image
    if isinstance(image, bytes):
        return Media("", image)
    try:
        return Media(mimetypes.guess_type(image)[0] or "", Path(image).read_bytes())
    except OSError as error:
        raise InvalidRequest(
            f"images has {str(image)!r}, which cannot be read: {error.strerror}", param="images"
        ) from None
