"""The gRPC front: protos in, protos out. Who may do it is the Door's to say, all work the RequestService's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from gateway.access import CallerRequests, Door
from gateway.grpc_access import value_of
from protos import gateway_pb2, gateway_pb2_grpc
from services.errors import NotEnabled
from services.wire import interpolation_limits_to_proto, params_from_proto

CHUNK_BYTES = 1024 * 1024
DONE = gateway_pb2.REQUEST_STATE_DONE


class GatewayServicer(gateway_pb2_grpc.GatewayServicer):
    """Errors become statuses in the server's interceptor.

    Once the gateway is `leaving`, it ends the calls itself: who follows a request then has not left it.
    """

    def __init__(self, door: Door) -> None:
        self._door = door
        self.leaving = False

    def _requests(self, context: Any) -> CallerRequests:
        return self._door.open(value_of(context.invocation_metadata(), "authorization"))

    async def Generate(  # noqa: N802 - the method's name in the proto
        self, request: gateway_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        """Submits and follows; a caller that leaves aborts, unless it detached."""
        requests = self._requests(context)
        with requests.refusals(request.params.model):
            request_id = await requests.submit(
                params_from_proto(request.params),
                idempotency_key=request.idempotency_key,
                priority=request.priority,
                traceparent=value_of(context.invocation_metadata(), "traceparent"),
            )
        inline, detach, ended = request.inline_artifact, request.detach, False
        # Its pictures are in Redis by now.
        del request
        try:
            async for event in self._follow(requests, request_id, "", inline):
                yield event
            ended = True
        finally:
            if not (ended or detach or self.leaving):
                await asyncio.shield(requests.leave(request_id))

    async def Watch(  # noqa: N802
        self, request: gateway_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        """Follows from an event on."""
        requests = self._requests(context)
        async for event in self._follow(requests, request.request_id, request.last_event_id, request.inline_artifact):
            yield event

    async def _follow(
        self, requests: CallerRequests, request_id: str, after: str, inline: bool
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        async for event in requests.events(request_id, after):
            yield event
            if event.WhichOneof("event") != "status" or event.status.state != DONE:
                continue
            if inline:
                async for data in requests.media(event.status):
                    for offset in range(0, len(data), CHUNK_BYTES):
                        response = gateway_pb2.GenerateResponse(request_id=request_id)
                        response.chunk.data = data[offset : offset + CHUNK_BYTES]
                        yield response

    async def Abort(self, request: gateway_pb2.AbortRequest, context: Any) -> gateway_pb2.AbortResponse:  # noqa: N802
        """Cancels."""
        return gateway_pb2.AbortResponse(state=await self._requests(context).abort(request.request_id))

    async def Get(self, request: gateway_pb2.GetRequest, context: Any) -> gateway_pb2.GetResponse:  # noqa: N802
        """One request."""
        return gateway_pb2.GetResponse(status=await self._requests(context).get(request.request_id))

    async def List(self, request: gateway_pb2.ListRequest, context: Any) -> gateway_pb2.ListResponse:  # noqa: N802
        """The newest requests."""
        return gateway_pb2.ListResponse(requests=await self._requests(context).newest(request.limit))

    async def Models(self, request: gateway_pb2.ModelsRequest, context: Any) -> gateway_pb2.ModelsResponse:  # noqa: N802
        """What is served."""
        requests = self._requests(context)
        response = gateway_pb2.ModelsResponse(models=requests.models())
        with contextlib.suppress(NotEnabled):
            response.interpolation_limits.CopyFrom(interpolation_limits_to_proto(requests.interpolation_limits()))
        return response

    async def Trace(self, request: gateway_pb2.TraceRequest, context: Any) -> gateway_pb2.TraceResponse:  # noqa: N802
        """One request's timeline."""
        return gateway_pb2.TraceResponse(spans=await self._requests(context).trace(request.request_id))
