"""Callers that send much or slowly, or never go: a gateway bounds their time, bytes and number."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator

import grpc
import pytest

from protos import gateway_pb2, gateway_pb2_grpc
from services.client import error_from_rpc
from services.errors import Overloaded
from tests.cluster.gateway_process import GatewayProcess, gateway
from tests.cluster.redis_process import RedisProcess, redis_process

MIB = 1024 * 1024
# The gateway lets bodies hold a quarter of it.
SETTINGS = {"body_timeout_s": 1.5, "max_held_bytes": 8 * MIB, "max_connections": 6}


@pytest.fixture(scope="module")
def redis(tmp_path_factory) -> Iterator[RedisProcess]:
    with redis_process(tmp_path_factory.mktemp("redis"), "maxmemory-policy noeviction") as running:
        yield running


@pytest.fixture(scope="module")
def alone(tmp_path_factory, redis) -> Iterator[GatewayProcess]:
    """A gateway without stages: what is tested comes before them."""
    url, nobody = f"redis://127.0.0.1:{redis.port}/0", dict.fromkeys(("text_encoder", "dit", "vae"), "127.0.0.1:1")
    with gateway(tmp_path_factory.mktemp("slow"), url, nobody, 503, settings={"gateway": SETTINGS}) as running:
        yield running


@contextlib.contextmanager
def unfinished(running: GatewayProcess, nbytes: int) -> Iterator[socket.socket]:
    """A request whose body breaks off."""
    head = (
        f"POST /v1/requests HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {4 * MIB}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", running.http_port), timeout=10) as connection:
        connection.sendall(head.encode() + b'{"prompt": "' + b"a" * nbytes)
        yield connection


def answer(connection: socket.socket) -> tuple[int, str]:
    """Status and code, of a server that closes behind its answer."""
    data = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_a_body_that_never_ends_is_given_up_in_time(alone) -> None:
    started_s = time.monotonic()
    with unfinished(alone, 100) as one, unfinished(alone, MIB) as other:
        assert answer(one) == answer(other) == (408, "request_timeout")
    assert 1.4 < time.monotonic() - started_s < 5.0


def test_bodies_that_arrive_at_once_are_bounded_in_bytes(alone) -> None:
    with unfinished(alone, MIB), unfinished(alone, MIB - 100):
        time.sleep(0.3)
        refused = alone.rest.post("/v1/requests", json={"prompt": "a" * MIB})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded"), refused.text
        assert refused.headers["retry-after"] == "1"


async def test_grpc_messages_are_bounded_in_bytes(alone, redis) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{alone.grpc_port}") as channel:
        stub = gateway_pb2_grpc.GatewayStub(channel)
        large = gateway_pb2.AbortRequest(request_id="a" * MIB)
        # What Redis does not answer is held until the gateway's patience ends.
        redis.process.send_signal(signal.SIGSTOP)
        try:
            held = [stub.Abort(large), stub.Watch(gateway_pb2.WatchRequest(request_id="a" * (MIB - 100)))]
            # Not before both have been counted: gRPC promises no order of calls.
            await asyncio.sleep(0.3)
            started_s = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Abort(large)
            assert time.monotonic() - started_s < 1.0
        finally:
            redis.process.send_signal(signal.SIGCONT)
        error = error_from_rpc(refused.value)
        assert isinstance(error, Overloaded) and error.retry_after_s == 1.0
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in held:
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await (call if call is held[0] else call.read())
            assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.Abort(large)
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_grpc_message_of_another_type_is_the_callers_fault(alone) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{alone.grpc_port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="cannot be parsed") as refused:
            await channel.unary_unary("/lightloom.v1.Gateway/Get")(b"\x0a\x05ab")
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_connections_are_bounded(alone) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(SETTINGS["max_connections"]):
            stack.enter_context(socket.create_connection(("127.0.0.1", alone.http_port)))
        time.sleep(0.3)
        assert alone.rest.get("/v1/models").status_code == 503
    time.sleep(0.3)
    assert alone.rest.get("/v1/models").status_code == 200
