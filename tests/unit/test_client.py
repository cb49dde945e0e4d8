"""Errors cross a real gRPC connection with their class, from every kind of handler; deadlines shrink."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from services.client import CHANNEL_OPTIONS, connect, error_from_rpc
from services.errors import (
    ERRORS,
    Code,
    DeadlineExceeded,
    DeviceLost,
    Internal,
    InvalidRequest,
    NotEnabled,
    NotReady,
    Overloaded,
    ServiceError,
)
from services.server import bind, create_server


class Failing:
    """Raises what the request names: a reason, `bug`, `status` or `broken` (bare gRPC aborts); else answers."""

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            "t.Failing",
            {
                "Unary": grpc.unary_unary_rpc_method_handler(self.unary),
                "Generator": grpc.unary_stream_rpc_method_handler(self.generator),
                "Writer": grpc.stream_stream_rpc_method_handler(self.writer),
            },
        )

    async def unary(self, request: bytes, context: Any) -> bytes:
        return await self._answer(request, context)

    async def generator(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        yield await self._answer(request, context)

    async def writer(self, requests: AsyncIterator[bytes], context: Any) -> None:
        async for request in requests:
            await context.write(await self._answer(request, context))

    async def _answer(self, request: bytes, context: Any) -> bytes:
        word = request.decode()
        if word in ERRORS:
            raise ERRORS[word]("grüße: what was wrong", param="steps", request_id="r1", retry_after_s=1.5)
        if word == "bug":
            raise KeyError("secret")
        if word == "status":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "of a proxy")
        if word == "broken":
            await context.abort(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2")
        if word == "sleep":
            await asyncio.sleep(30)
        return request


@pytest.fixture
async def port() -> AsyncIterator[int]:
    server = create_server()
    server.add_generic_rpc_handlers((Failing().handlers(),))
    bound = bind(server, "127.0.0.1", 0)
    await server.start()
    yield bound
    await server.stop(0)


@pytest.fixture
async def channel(port: int) -> AsyncIterator[grpc.aio.Channel]:
    async with connect(f"127.0.0.1:{port}") as connected:
        yield connected


async def ask(channel: grpc.aio.Channel, method: str, word: str, timeout: float = 10) -> list[bytes]:
    path, data = f"/t.Failing/{method}", word.encode()
    try:
        if method == "Generator":
            return [answer async for answer in channel.unary_stream(path)(data, timeout=timeout)]
        if method == "Writer":
            return [answer async for answer in channel.stream_stream(path)(iter([data]), timeout=timeout)]
        return [await channel.unary_unary(path)(data, timeout=timeout)]
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error


METHODS = ("Unary", "Generator", "Writer")


@pytest.mark.parametrize("method", METHODS)
async def test_every_error_keeps_its_class(channel: grpc.aio.Channel, method: str) -> None:
    for reason, cls in ERRORS.items():
        with pytest.raises(ServiceError) as caught:
            await ask(channel, method, reason)
        error = caught.value
        assert type(error) is cls
        assert (error.message, error.param, error.request_id) == ("grüße: what was wrong", "steps", "r1")
        assert error.retry_after_s == 1.5
    assert (await ask(channel, method, "fine"))[-1] == b"fine"


@pytest.mark.parametrize("method", METHODS)
async def test_bugs_and_bare_statuses(channel: grpc.aio.Channel, method: str) -> None:
    with pytest.raises(Internal) as caught:
        await ask(channel, method, "bug")
    assert "secret" not in str(caught.value)
    with pytest.raises(Overloaded, match="of a proxy"):
        await ask(channel, method, "status")
    with pytest.raises(DeviceLost, match="RST_STREAM"):
        await ask(channel, method, "broken")


async def test_what_grpc_itself_reports(channel: grpc.aio.Channel) -> None:
    with pytest.raises(DeadlineExceeded):
        await ask(channel, "Unary", "sleep", timeout=0.1)
    with pytest.raises(NotEnabled):
        await ask(channel, "Nothing", "x")
    with pytest.raises(InvalidRequest, match="too large"):
        await ask(channel, "Unary", "x" * 17 * 1024 * 1024)
    call = channel.unary_unary("/t.Failing/Unary")(b"sleep")
    await asyncio.sleep(0.1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (await ask(channel, "Unary", "fine")) == [b"fine"]


async def test_nobody_listens_and_somebody_leaves() -> None:
    server = create_server()
    server.add_generic_rpc_handlers((Failing().handlers(),))
    port = bind(server, "127.0.0.1", 0)
    async with connect(f"127.0.0.1:{port}") as channel:
        await server.start()
        call = asyncio.create_task(ask(channel, "Unary", "sleep"))
        await asyncio.sleep(0.3)
        await server.stop(0)
        with pytest.raises((DeviceLost, NotReady)):
            await call
        with pytest.raises(NotReady):
            await ask(channel, "Unary", "fine")


def test_the_sync_api_is_understood_too() -> None:
    with (
        grpc.insecure_channel("127.0.0.1:1", options=CHANNEL_OPTIONS) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary("/t.Failing/Unary")(b"", timeout=5)
    assert isinstance(error_from_rpc(caught.value), NotReady)


def test_every_code_has_a_status() -> None:
    assert {code.value for code in Code} <= {status.name for status in grpc.StatusCode}


def test_a_call_that_was_over_before_it_was_written_is_no_attempt() -> None:
    from services.errors import DeviceLost, NotReady

    def failed(details: str) -> Exception:
        metadata = grpc.aio.Metadata()
        return error_from_rpc(grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, metadata, metadata, details))

    assert isinstance(failed("Internal error from Core"), NotReady)
    assert isinstance(failed("Received RST_STREAM with error code 2"), DeviceLost)


async def test_a_peer_that_is_far_away_is_reached(port: int) -> None:
    """A connection takes several round trips, and each may take hundreds of milliseconds."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.0)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(reader, far_writer), carry(far_reader, writer))

    async with (
        await asyncio.start_server(line, "127.0.0.1", 0) as slow,
        connect(f"127.0.0.1:{slow.sockets[0].getsockname()[1]}") as far,
    ):
        assert await ask(far, "Unary", "fine") == [b"fine"]
