"""The gRPC front's door: a call that brings no valid key is refused before its message is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc

from gateway.access import Door
from services.errors import Unauthenticated


class KeyCheck(grpc.aio.ServerInterceptor):
    """Interceptor inside `ErrorInterceptor`, around all that takes messages; the method itself opens the door again.

    Args:
        service: full name of the one that needs keys. Health and reflection do without.
    """

    def __init__(self, door: Door, service: str) -> None:
        self._door = door
        self._methods = f"/{service}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method, or what refuses the call."""
        call: Any = handler_call_details
        if call.method.startswith(self._methods):
            try:
                self._door.open(value_of(call.invocation_metadata, "authorization"))
            except Unauthenticated as error:
                return _refusing(error)
        return await continuation(handler_call_details)


def _refusing(error: Unauthenticated) -> Any:
    async def refuse(_messages: Any, _context: Any) -> None:
        raise error

    # Of a stream, nothing is read unless it is asked for; on the wire, a single message is the same.
    return grpc.stream_stream_rpc_method_handler(refuse)


def value_of(metadata: Iterable[tuple[str, Any]] | None, name: str) -> Any:
    """What the caller's metadata has under a name; empty for nothing."""
    return next((value for key, value in metadata or () if key == name), "")
