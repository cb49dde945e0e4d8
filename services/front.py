"""The front of a stage: a gRPC server that relays calls to its rank process as bytes.

It imports no torch and parses only the first message of a call (for its context), so health, Describe, admission and
cancels answer while the rank computes or hangs. `python -m X_svc` is a call of `serve_stage`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from prometheus_client import CollectorRegistry, Counter, Histogram

from protos import dit_pb2, types_pb2
from services import telemetry
from services.admission import RETRY_AFTER_S, Admission
from services.channel import MAX_FRAME_BYTES, OpenCall
from services.config import StageConfig
from services.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    ServiceError,
    StartupError,
)
from services.parallel.degrees import Degrees, check_axes
from services.rank_group import RankCall, RankGroup
from services.server import Health, abort_with, bind, create_server, parse_arguments, stop_event
from services.tls import ServerCertificates
from services.wire import PROTOCOL_VERSION

MAX_ID_CHARS = 128
DRAIN_POLL_S = 0.02
STOP_GRACE_S = 0.5

_log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[bytes, bytes]


def serve_stage(service: ServiceDescriptor, rank_module: str, *, axes: Sequence[str] = ()) -> None:
    """The main function of a stage: reads the command line, serves until SIGTERM.

    Args:
        service: descriptor of its gRPC service.
        rank_module: what `python -m` runs as its rank process.
        axes: along which several ranks can serve it together (`services/parallel/degrees.py`).

    Raises:
        StartupError: bad config, a port in use, or a rank that cannot start.
    """
    config = parse_arguments(StageConfig, f"The {service.name} stage of Lightloom")
    telemetry.setup(config.service.name or service.name.lower())
    degrees = Degrees.of(config.parallel)
    world = degrees.world
    if world > 1 and ":" in config.model.device:
        raise StartupError(f"model.device {config.model.device!r} names one device for {world} ranks: write cuda")
    check_axes(degrees, axes, service.name)
    asyncio.run(_serve(config, service, rank_module))


async def _serve(config: StageConfig, service: ServiceDescriptor, rank_module: str) -> None:
    stop = stop_event()
    ready_changed = asyncio.Event()
    group = RankGroup(config, rank_module, ready_changed.set)
    front = Front(config, service, group)
    certificates = ServerCertificates(config.tls) if config.tls.on else None
    server = create_server()
    server.add_generic_rpc_handlers((front.handlers(),))
    health = Health(server, [service.full_name])
    await health.set_serving(False)
    port = bind(server, config.service.host, config.service.port, certificates)
    probes = create_server()
    if config.service.health_port:
        health.answer_on(probes)
        bind(probes, config.service.host, config.service.health_port)
        await probes.start()
    stop_metrics = front.serve_metrics()
    await server.start()
    _log.info("listening", extra={"host": config.service.host, "port": port, "config": json.dumps(asdict(config))})
    supervisor = asyncio.create_task(group.supervise(), name="rank group")
    reporter = asyncio.create_task(_report_health(front, health, ready_changed), name="health")
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({supervisor, stopped}, return_when=asyncio.FIRST_COMPLETED)
        front.draining = True
        ready_changed.set()
        if stop.is_set():
            _log.info("draining", extra={"in_flight": front.in_flight})
            group.drain()
            await front.drained(config.service.drain_timeout_s)
    finally:
        group.stop()
        await server.stop(STOP_GRACE_S)
        await probes.stop(None)
        reporter.cancel()
        stop_metrics()
        stopped.cancel()
        # Raises StartupError when the group gave up.
        await supervisor


async def _report_health(front: Front, health: Health, changed: asyncio.Event) -> None:
    while True:
        await changed.wait()
        changed.clear()
        serving = front.ready
        await health.set_serving(serving)
        _log.info("serving" if serving else "not serving")


@dataclass(frozen=True, slots=True)
class Method:
    """A relayed method: its name, and the class of its request, whose context is read."""

    name: str
    request_class: Any
    request_streaming: bool

    @classmethod
    def of(cls, descriptor: MethodDescriptor) -> Method:
        """From the service's descriptor."""
        return cls(descriptor.name, GetMessageClass(descriptor.input_type), descriptor.client_streaming)

    def context_of(self, first: bytes) -> types_pb2.RequestContext:
        """The context in the first message: its own field, or its `start`'s.

        Raises:
            InvalidRequest: there is none, or its id is empty or too long.
        """
        try:
            message = self.request_class.FromString(first)
        except DecodeError as error:
            raise InvalidRequest("the first message cannot be parsed: is the caller of another version?") from error
        holder = message.start if self.request_streaming else message
        context: types_pb2.RequestContext = holder.context
        _check_id(context)
        return context


class Front:
    """The handlers of one stage service."""

    def __init__(self, config: StageConfig, service: ServiceDescriptor, group: RankGroup) -> None:
        self._config = config
        self._service = service
        self._group = group
        self._admission = Admission(config.service.max_in_flight)
        self._replica_id = uuid.uuid4().hex
        self._registry = CollectorRegistry()
        self._registry.register(telemetry.Figures(self._figures))
        self._calls = Counter("lightloom_calls", "Calls by outcome", ["method", "outcome"], registry=self._registry)
        self._seconds = Histogram(
            "lightloom_call_seconds",
            "Seconds from a call's first message to its end",
            ["method"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
            registry=self._registry,
        )
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether the service takes calls."""
        return self._group.description is not None and not self.draining

    @property
    def in_flight(self) -> int:
        """Calls in work or waiting in the rank."""
        return self._admission.in_flight

    def handlers(self) -> grpc.GenericRpcHandler:
        """All methods of the service; everything but Describe and Release is relayed."""
        own: dict[str, Callable[..., Awaitable[Any]]] = {"Describe": self._describe, "Release": self._release}
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for descriptor in self._service.methods:
            if descriptor.name in own:
                methods[descriptor.name] = grpc.unary_unary_rpc_method_handler(
                    own[descriptor.name],
                    request_deserializer=GetMessageClass(descriptor.input_type).FromString,
                    response_serializer=GetMessageClass(descriptor.output_type).SerializeToString,
                )
            else:
                methods[descriptor.name] = self._relay_handler(Method.of(descriptor))
        return grpc.method_handlers_generic_handler(self._service.full_name, methods)

    def serve_metrics(self) -> Any:
        """Opens the metrics page if the config has a port for it; returns what closes it."""
        service = self._config.service
        if not service.metrics_port:
            return lambda: None
        return telemetry.serve_metrics(self._registry, service.host, service.metrics_port)

    async def drained(self, timeout_s: float) -> None:
        """Waits until no call is left, for `timeout_s` at most."""
        end_s = time.monotonic() + timeout_s
        while self.in_flight and time.monotonic() < end_s:  # noqa: ASYNC110 - once in a process's life
            await asyncio.sleep(DRAIN_POLL_S)

    def _figures(self) -> dict[str, float]:
        own = {
            "ready": float(self.ready),
            "in_flight": float(self.in_flight),
            "max_in_flight": float(self._config.service.max_in_flight),
            "rank_restarts_total": float(self._group.restarts),
        }
        return {**{f"rank_{name}": value for name, value in self._group.metrics.items()}, **own}

    async def _describe(self, _request: types_pb2.DescribeRequest, _context: Context) -> types_pb2.DescribeResponse:
        description = types_pb2.DescribeResponse()
        description.CopyFrom(self._known())
        description.protocol_version = PROTOCOL_VERSION
        description.build = build_version()
        description.replica_id = self._replica_id
        degrees = Degrees.of(self._config.parallel)
        description.world_size, description.layout = degrees.world, degrees.words
        description.max_in_flight = self._config.service.max_in_flight
        description.max_cost = self._config.service.max_cost
        description.in_flight = self.in_flight
        description.draining = self.draining
        return description

    async def _release(self, request: dit_pb2.ReleaseRequest, _context: Context) -> dit_pb2.ReleaseResponse:
        _check_id(request.context)
        self._admission.release(request.context)
        return dit_pb2.ReleaseResponse()

    def _known(self) -> types_pb2.DescribeResponse:
        description = self._group.description
        if description is None:
            raise NotReady("the replica is starting", retry_after_s=RETRY_AFTER_S)
        return description

    def _relay_handler(self, method: Method) -> grpc.RpcMethodHandler[Any, Any]:
        # Without serialisers, requests and responses are bytes.
        if method.request_streaming:

            async def stream(requests: AsyncIterator[bytes], context: Context) -> None:
                await self._answer(method, requests, context)

            return grpc.stream_stream_rpc_method_handler(stream)

        async def unary(request: bytes, context: Context) -> None:
            await self._answer(method, _once(request), context)

        return grpc.unary_stream_rpc_method_handler(unary)

    async def _answer(self, method: Method, requests: AsyncIterator[bytes], context: Context) -> None:
        started_s = time.monotonic()
        outcome = "ok"
        try:
            with self._admission.slot():
                await self._relay(method, requests, context)
        except ServiceError as error:
            outcome = error.reason
            await abort_with(context, error)
        except asyncio.CancelledError:
            # gRPC cancels the handler when the caller leaves and when the deadline passes.
            left_s = context.time_remaining()
            outcome = DeadlineExceeded.reason if left_s is not None and left_s <= 0 else Cancelled.reason
            raise
        except BaseException:
            outcome = "internal"
            raise
        finally:
            seconds = time.monotonic() - started_s
            self._calls.labels(method.name, outcome).inc()
            self._seconds.labels(method.name).observe(seconds)
            _log.info("call ended", extra={"method": method.name, "outcome": outcome, "seconds": round(seconds, 4)})

    async def _relay(self, method: Method, requests: AsyncIterator[bytes], context: Context) -> None:
        self._check_open()
        first = await anext(requests, None)
        if first is None:
            raise InvalidRequest("the call ended before its first message")
        _check_size(first)
        request = method.context_of(first)
        self._admission.take_over(method.name, request)
        async with self._admission.place(request):
            # It may have waited, and much may have changed.
            self._check_open()
            self._admission.take_over(method.name, request)
            await self._run(method, first, request, requests, context)

    def _check_open(self) -> None:
        if self.draining:
            raise NotReady("the replica is leaving", retry_after_s=RETRY_AFTER_S)
        self._known()

    async def _run(
        self,
        method: Method,
        first: bytes,
        request: types_pb2.RequestContext,
        requests: AsyncIterator[bytes],
        context: Context,
    ) -> None:
        traceparent = _traceparent(context)
        telemetry.request_id_var.set(request.request_id)
        telemetry.traceparent_var.set(traceparent)
        left_s = context.time_remaining()
        deadline_unix_s = time.time() + left_s if left_s is not None else 0.0
        call = self._group.open(
            OpenCall(method.name, request.request_id, traceparent, deadline_unix_s, fence=request.fence)
        )
        with self._admission.running(method.name, request, call):
            pump = asyncio.create_task(_pump(first, requests, call))
            try:
                while (message := await call.receive()) is not None:
                    await context.write(message)
            finally:
                pump.cancel()
                call.close()


async def _pump(first: bytes, requests: AsyncIterator[bytes], call: RankCall) -> None:
    """Passes the caller's messages to the rank until there are no more, or one is wrong."""
    try:
        await call.send(first)
        async for message in requests:
            _check_size(message)
            await call.send(message)
        call.half_close()
    except ServiceError as error:
        call.cancel(error)


def _check_id(context: types_pb2.RequestContext) -> None:
    if not 0 < len(context.request_id) <= MAX_ID_CHARS:
        raise InvalidRequest(
            f"the call must start with a context whose request_id has 1 to {MAX_ID_CHARS} characters",
            param="request_id",
        )


def _check_size(message: bytes) -> None:
    if len(message) > MAX_FRAME_BYTES:
        raise InvalidRequest(f"a message has {len(message)} bytes: at most {MAX_FRAME_BYTES} are allowed")


async def _once(request: bytes) -> AsyncIterator[bytes]:
    yield request


def _traceparent(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent" and isinstance(value, str):
            return telemetry.new_traceparent(value)
    return telemetry.new_traceparent()


def build_version() -> str:
    """The installed version of Lightloom."""
    try:
        return metadata.version("lightloom")
    except metadata.PackageNotFoundError:
        return "source"
