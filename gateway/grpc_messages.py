"""How much the gRPC front holds of what callers send: all messages together, as `http_bodies` counts bodies."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from services.errors import InvalidRequest, Overloaded

RETRY_AFTER_S = 1.0


class MessageCredits(grpc.aio.ServerInterceptor):
    """Interceptor inside `ErrorInterceptor`: a message counts from its arrival until the call's first answer.

    It is parsed only when there is room for it. While it arrives it is gRPC's: within the size of one message a call.

    Args:
        max_bytes: of all calls together; who would exceed it is refused with RESOURCE_EXHAUSTED. One message alone may.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the methods that take one message and answer with one, or from a generator."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        parse, encode = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary:
            one = self._one(handler.unary_unary, parse)
            return grpc.unary_unary_rpc_method_handler(one, _Message, encode)
        if inspect.isasyncgenfunction(handler.unary_stream):
            many = self._many(handler.unary_stream, parse)
            return grpc.unary_stream_rpc_method_handler(many, _Message, encode)
        return handler

    def _one(self, behaviour: Callable[..., Awaitable[Any]], parse: Callable[[bytes], Any]) -> Callable[..., Any]:
        async def counted(message: _Message, context: Any) -> Any:
            with self._credit(message.nbytes):
                return await behaviour(message.parsed(parse), context)

        return counted

    def _many(self, behaviour: Callable[..., AsyncIterator[Any]], parse: Callable[[bytes], Any]) -> Callable[..., Any]:
        async def counted(message: _Message, context: Any) -> AsyncIterator[Any]:
            with contextlib.ExitStack() as credit:
                credit.enter_context(self._credit(message.nbytes))
                async for response in behaviour(message.parsed(parse), context):
                    credit.close()
                    yield response

        return counted

    @contextlib.contextmanager
    def _credit(self, nbytes: int) -> Iterator[None]:
        if self._held and self._held + nbytes > self._max_bytes:
            text = "too many large requests arrive at once: try again"
            raise Overloaded(text, retry_after_s=RETRY_AFTER_S)
        self._held += nbytes
        try:
            yield
        finally:
            self._held -= nbytes


class _Message:
    """A message as it came. gRPC holds on to what a handler is given, so the bytes can be taken out of it."""

    def __init__(self, data: bytes) -> None:
        self.nbytes = len(data)
        self._data = data

    def parsed(self, parse: Callable[[bytes], Any]) -> Any:
        """The message, once; only the caller holds it then.

        Raises:
            InvalidRequest: it is none.
        """
        data, self._data = self._data, b""
        try:
            return parse(data)
        except DecodeError as error:
            raise InvalidRequest("the message cannot be parsed: it is not of the method's type") from error
