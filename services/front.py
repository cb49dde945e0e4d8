"""The front of a stage: gRPC server, health, admission, fences, and the relay to the rank.

It imports no torch and parses only the first message of a call (for its context), so it answers health, Describe and
cancels while the rank computes or hangs. Messages pass through as bytes in both directions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import REGISTRY, Counter, Gauge, start_http_server

from protos import types_pb2
from services import telemetry
from services.channel import Kind
from services.config import StageConfig, parse
from services.errors import InvalidRequest, NotReady, Overloaded, ServiceError, StaleFence, StartupError
from services.rank_group import RankCall, RankGroup
from services.server import SERVER_OPTIONS, abort_with, bind, read_arguments
from services.wire import PROTOCOL_VERSION

log = logging.getLogger(__name__)

KNOWN_FENCES = 10_000
DRAIN_POLL_S = 0.05

REQUESTS = Counter("lightloom_stage_requests", "Calls by how they ended", ["method", "outcome"])
IN_FLIGHT = Gauge("lightloom_stage_in_flight", "Calls in work or waiting")
READY = Gauge("lightloom_stage_ready", "1 while a rank is ready")
RESTARTS = Gauge("lightloom_stage_rank_restarts", "Times the rank was started again")


class RankMetrics:
    """The numbers the rank reports each second, as gauges named `lightloom_rank_*`."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group

    def collect(self) -> list[Any]:
        """One gauge for each number."""
        from prometheus_client.core import GaugeMetricFamily

        RESTARTS.set(self._group.restarts)
        return [
            GaugeMetricFamily(f"lightloom_rank_{name}", f"{name} of the rank", value=value)
            for name, value in self._group.status.items()
        ]


class Fences:
    """The highest fence seen for each request, for the newest requests."""

    def __init__(self) -> None:
        self._highest: OrderedDict[str, int] = OrderedDict()

    def check(self, context: types_pb2.RequestContext) -> None:
        """Raises StaleFence when a newer owner has called."""
        highest = self._highest.pop(context.request_id, 0)
        self._highest[context.request_id] = max(highest, context.fence)
        while len(self._highest) > KNOWN_FENCES:
            self._highest.popitem(last=False)
        if context.fence < highest:
            raise StaleFence(f"fence {context.fence} is older than {highest}", request_id=context.request_id)


@dataclass(frozen=True, slots=True)
class Opening:
    """What the front reads from a call before it passes it on."""

    first: bytes
    context: types_pb2.RequestContext


class Front:
    """Handlers of one stage service."""

    def __init__(self, config: StageConfig, service: ServiceDescriptor, group: RankGroup) -> None:
        self._config = config
        self._service = service
        self._group = group
        self._fences = Fences()
        self._replica_id = uuid.uuid4().hex[:12]
        self.in_flight = 0
        self.draining = False

    def handlers(self) -> grpc.GenericRpcHandler:
        """All methods of the service, as relays of bytes; Describe is answered here."""
        methods = {m.name: self._method(m) for m in self._service.methods if m.name != "Describe"}
        methods["Describe"] = grpc.unary_unary_rpc_method_handler(
            self._describe,
            request_deserializer=types_pb2.DescribeRequest.FromString,
            response_serializer=types_pb2.DescribeResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(self._service.full_name, methods)

    def _method(self, method: MethodDescriptor) -> Any:
        request_class = GetMessageClass(method.input_type)

        async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for reply in self._answer(method.name, request_class, requests, context):
                yield reply

        async def unary(request: bytes, context: Any) -> AsyncIterator[bytes]:
            async for reply in self._answer(method.name, request_class, _one(request), context):
                yield reply

        if method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_stream_rpc_method_handler(unary)

    async def _describe(self, _request: types_pb2.DescribeRequest, context: Any) -> types_pb2.DescribeResponse:
        known = self._group.describe
        if known is None:
            await abort_with(context, NotReady("the replica is starting", retry_after_s=1.0))
        answer = types_pb2.DescribeResponse()
        answer.CopyFrom(known)
        answer.protocol_version = PROTOCOL_VERSION
        answer.build = build_version()
        answer.replica_id = self._replica_id
        answer.max_in_flight = self._config.service.max_in_flight
        answer.in_flight = self.in_flight
        answer.draining = self.draining
        return answer

    async def _answer(
        self, method: str, request_class: Any, requests: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[bytes]:
        outcome = "ok"
        self.in_flight += 1
        IN_FLIGHT.set(self.in_flight)
        try:
            opening = await self._admit(request_class, requests)
            telemetry.request_id_var.set(opening.context.request_id)
            async for reply in self._relay(method, opening, requests, context):
                yield reply
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception as error:  # noqa: BLE001 - every error becomes a status
            outcome = error.reason if isinstance(error, ServiceError) else "internal"
            await abort_with(context, error)
        finally:
            self.in_flight -= 1
            IN_FLIGHT.set(self.in_flight)
            REQUESTS.labels(method, outcome).inc()

    async def _admit(self, request_class: Any, requests: AsyncIterator[bytes]) -> Opening:
        if self.draining:
            raise NotReady("the replica is leaving", retry_after_s=1.0)
        limit = self._config.service.max_in_flight
        if self.in_flight > limit:
            raise Overloaded(f"the replica has {limit} requests, its most", retry_after_s=1.0)
        first = await anext(aiter(requests), None)
        if first is None:
            raise InvalidRequest("the call ended before its first message")
        try:
            message = request_class.FromString(first)
        except DecodeError as error:
            raise InvalidRequest(f"the first message cannot be parsed: {error}") from error
        start = message if "context" in message.DESCRIPTOR.fields_by_name else getattr(message, "start", None)
        if start is None or not start.HasField("context") or not start.context.request_id:
            raise InvalidRequest("the first message must carry a context with a request_id", param="context")
        self._fences.check(start.context)
        return Opening(first, start.context)

    async def _relay(
        self, method: str, opening: Opening, requests: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[bytes]:
        left_s = context.time_remaining()
        call = await self._group.open(
            {
                "method": method,
                "request_id": opening.context.request_id,
                "traceparent": _traceparent(context),
                "deadline_unix_s": time.time() + left_s if left_s is not None else 0,
                "fence": opening.context.fence,
            }
        )
        forward = asyncio.create_task(self._forward(call, opening.first, requests))
        try:
            while (reply := await call.replies.get()) is not None:
                yield reply
            if call.error is not None:
                raise call.error
        finally:
            forward.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await forward
            await self._group.close(call)

    async def _forward(self, call: RankCall, first: bytes, requests: AsyncIterator[bytes]) -> None:
        await self._group.send(call, Kind.MESSAGE, first)
        async for message in requests:
            await self._group.send(call, Kind.MESSAGE, message)
        await self._group.send(call, Kind.HALF_CLOSE)


def serve_stage(service: ServiceDescriptor, rank_module: str) -> None:
    """The main function of a stage's front, until SIGTERM.

    Args:
        service: descriptor of its gRPC service.
        rank_module: `python -m` name of its rank.

    Raises:
        StartupError: bad config, a port in use, or weights that cannot be served.
    """
    config = parse(StageConfig, read_arguments(f"Lightloom stage {service.name}"))
    telemetry.setup(config.service.name or service.name.lower())
    if config.parallel.world_size != 1:
        raise StartupError(f"parallel.world_size is {config.parallel.world_size}: this build runs groups of 1 rank")
    asyncio.run(_serve(config, service, rank_module))


async def _serve(config: StageConfig, service: ServiceDescriptor, rank_module: str) -> None:
    checks = health.aio.HealthServicer()

    def health_changed() -> None:
        serving = group.describe is not None and not front.draining
        READY.set(serving)
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", service.full_name):
            tasks.add(asyncio.ensure_future(checks.set(name, status)))

    tasks: set[asyncio.Future[None]] = set()
    group = RankGroup(config, rank_module, health_changed)
    front = Front(config, service, group)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((front.handlers(),))
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((service.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    health_changed()
    port = bind(server, config.service.host, config.service.port)
    _serve_metrics(config, group)
    await server.start()
    log.info("listening on %s:%d", config.service.host, port)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    ranks, stopped = asyncio.create_task(group.run()), asyncio.create_task(stop.wait())
    await asyncio.wait({ranks, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if stopped.done():
        front.draining = True
        health_changed()
        await group.shutdown()
        await _drained(front, config.service.drain_timeout_s)
    await group.stop()
    await server.stop(grace=0.2)
    await ranks


async def _drained(front: Front, timeout_s: float) -> None:
    end_s = time.monotonic() + timeout_s
    while front.in_flight and time.monotonic() < end_s:  # noqa: ASYNC110 - once in a process's life
        await asyncio.sleep(DRAIN_POLL_S)


def _serve_metrics(config: StageConfig, group: RankGroup) -> None:
    if not config.service.metrics_port:
        return
    REGISTRY.register(RankMetrics(group))
    try:
        start_http_server(config.service.metrics_port, config.service.host)
    except OSError as error:
        raise StartupError(f"cannot listen on metrics_port {config.service.metrics_port}: {error.strerror}") from error


async def _one(request: bytes) -> AsyncIterator[bytes]:
    yield request


def _traceparent(context: Any) -> str:
    pairs: Mapping[str, str] = dict(context.invocation_metadata() or ())
    return telemetry.new_traceparent(pairs.get("traceparent", ""))


def build_version() -> str:
    """The installed version of Lightloom."""
    try:
        return metadata.version("lightloom")
    except metadata.PackageNotFoundError:
        return "source"
