"""Latents to media over two stages: what either of them fails with, and what a slow one does to the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any, cast

import grpc
import pytest

from gateway.decode import Decode
from gateway.digests import CHUNK_BYTES
from gateway.records import Claim
from gateway.replica import Replica
from gateway.stage_calls import Latents
from gateway.work import Progress, Work
from protos import interpolation_pb2, types_pb2, vae_pb2
from services.client import connect
from services.errors import CorruptTensor, DeviceLost, OutOfMemory, ServiceError
from services.server import abort_with
from services.tensor_wire import chunk_message, end_message

Context = grpc.aio.ServicerContext[bytes, bytes]
Handler = Callable[[AsyncIterator[bytes], Context], Awaitable[None]]
MIB = 1024 * 1024
PARAMS = types_pb2.GenerationParams(
    num_frames=5, enable_frame_interpolation=True, frame_interpolation_exp=2, frame_interpolation_scale=0.5
)


def media(data: bytes, announced: int | None = None) -> list[bytes]:
    header = types_pb2.MediaHeader(mime="video/mp4", nbytes=len(data) if announced is None else announced)
    usage = types_pb2.StageUsage(busy_s=2.0)
    answers: list[dict[str, Any]] = [{"media": header}, {"chunk": types_pb2.MediaChunk(data=data)}, {"usage": usage}]
    return [vae_pb2.DecodeResponse(**answer).SerializeToString() for answer in answers]


USAGE = vae_pb2.DecodeResponse(usage=types_pb2.StageUsage(busy_s=1.0)).SerializeToString()


class State:
    """Takes beats."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    async def beat(self, _claim: Claim, _lease_s: float, *, kind: str, payload: bytes, step: int, total: int) -> None:
        self.told.append((kind, step))
        assert not payload and not total


@asynccontextmanager
async def hop(
    vae: Handler, interpolation: Handler, state: State | None = None
) -> AsyncIterator[tuple[Decode, Replica, Replica]]:
    """A Decode over two real servers, with latents that are whole."""
    server = grpc.aio.server()
    for service, method, handler in (("Vae", "Decode", vae), ("Interpolation", "Interpolate", interpolation)):
        methods = {method: grpc.stream_stream_rpc_method_handler(handler)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(f"lightloom.v1.{service}", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = connect(f"127.0.0.1:{port}")
    replicas = Replica("vae", "v", channel), Replica("interpolation", "i", channel)
    work = Work(Claim("r", 7, {}, "", 0), PARAMS, asyncio.get_running_loop().time() + 3600, "")
    progress = Progress(cast(Any, state or State()), work.claim, 10.0)
    decode = Decode(work, replicas[0], Latents([end_message()], whole=True), progress, replicas[1])
    try:
        yield decode, *replicas
    finally:
        await decode.close()
        assert not replicas[0].batches and not replicas[1].batches, "both are free again"
        await channel.close()
        await server.stop(None)


async def drain(requests: AsyncIterator[bytes]) -> list[bytes]:
    return [message async for message in requests]


async def test_frames_pass_as_they_are_and_media_come_from_the_second_stage() -> None:
    frames = [chunk_message(0, 0, b"abc"), end_message(), chunk_message(0, 0, b"de"), end_message()]
    seen: dict[str, list[bytes]] = {}

    async def vae(requests: AsyncIterator[bytes], context: Context) -> None:
        seen["vae"] = await drain(requests)
        for message in (*frames, USAGE):
            await context.write(message)

    async def interpolation(requests: AsyncIterator[bytes], context: Context) -> None:
        seen["interpolation"] = await drain(requests)
        for message in media(b"video"):
            await context.write(message)

    async with hop(vae, interpolation) as (decode, _, _):
        assert await decode.media() == b"video"
        assert {stage: usage.busy_s for stage, usage in (await decode.ended()).items()} == {
            "vae": 1.0,
            "interpolation": 2.0,
        }
    assert vae_pb2.DecodeRequest.FromString(seen["vae"][0]).start.frames_only
    start = interpolation_pb2.InterpolateRequest.FromString(seen["interpolation"][0]).start
    assert (start.exponent, start.scale, start.num_frames, start.context.fence) == (2, 0.5, 5, 7)
    assert seen["interpolation"][1:] == frames


async def test_large_media_are_hashed_as_they_come() -> None:
    data = bytes(range(256)) * (9 * MIB // 256)
    header, _, usage = media(b"", len(data))
    pieces = [types_pb2.MediaChunk(data=data[at : at + MIB]) for at in range(0, len(data), MIB)]

    async def vae(requests: AsyncIterator[bytes], context: Context) -> None:
        await drain(requests)
        await context.write(USAGE)

    async def interpolation(requests: AsyncIterator[bytes], context: Context) -> None:
        await drain(requests)
        chunks = [vae_pb2.DecodeResponse(chunk=piece).SerializeToString() for piece in pieces]
        for message in (header, *chunks, usage):
            await context.write(message)

    async with hop(vae, interpolation) as (decode, _, _):
        assert await decode.media() == data
        await decode.ended()
        assert decode.digests is not None
        whole, parts = decode.digests.ended()
    assert whole == sha256(data).hexdigest()
    assert parts == [sha256(data[at : at + CHUNK_BYTES]).hexdigest() for at in range(0, len(data), CHUNK_BYTES)]


async def test_frames_of_the_second_stage_are_told() -> None:
    async def vae(_requests: AsyncIterator[bytes], context: Context) -> None:
        await context.write(USAGE)

    async def interpolation(requests: AsyncIterator[bytes], context: Context) -> None:
        await drain(requests)
        for made in (4, 5, 9):
            await context.write(vae_pb2.DecodeResponse(frames=made).SerializeToString())
        for message in media(b"video"):
            await context.write(message)

    state = State()
    async with hop(vae, interpolation, state) as (decode, *_):
        assert await decode.media() == b"video"
    # Those that follow within a fifth of a second are not worth another call.
    assert state.told == [("frames", 4)]


def failing(error: ServiceError, after: int) -> Handler:
    """Ends the call with the error after so many messages."""

    async def fail(requests: AsyncIterator[bytes], context: Context) -> None:
        for _ in range(after):
            await anext(requests)
        await abort_with(context, error)

    return fail


async def waiting(requests: AsyncIterator[bytes], _context: Context) -> None:
    await drain(requests)
    await asyncio.sleep(60)


@pytest.mark.parametrize("error", [DeviceLost("its rank died"), OutOfMemory("too large")], ids=lambda e: e.reason)
async def test_either_stages_failure_ends_both_and_is_told(error: ServiceError) -> None:
    for vae, interpolation in ((failing(error, 2), waiting), (waiting, failing(error, 1))):
        async with hop(vae, interpolation) as (decode, *_):
            async with asyncio.timeout(10):
                with pytest.raises(type(error), match=error.message):
                    await decode.media()


async def test_a_failure_amid_frames_counts_as_an_attempt() -> None:
    """gRPC can lose what a call ended with to a message that is written just then."""

    async def vae(_requests: AsyncIterator[bytes], context: Context) -> None:
        while True:
            await context.write(end_message())

    for _ in range(20):
        async with hop(vae, failing(OutOfMemory("too large"), 3)) as (decode, *_):
            async with asyncio.timeout(10):
                with pytest.raises((OutOfMemory, DeviceLost)):
                    await decode.media()


@pytest.mark.parametrize(
    "answers", [media(b"abc", announced=2), media(b"abc", announced=4), []], ids=["more", "less", "nothing"]
)
async def test_media_come_as_announced(answers: list[bytes]) -> None:
    async def vae(_requests: AsyncIterator[bytes], context: Context) -> None:
        await context.write(USAGE)

    async def interpolation(requests: AsyncIterator[bytes], context: Context) -> None:
        await drain(requests)
        for message in answers:
            await context.write(message)

    async with hop(vae, interpolation) as (decode, *_):
        with pytest.raises(CorruptTensor, match="the interpolation announced"):
            await decode.media()


async def test_a_slow_interpolator_holds_the_vae_back() -> None:
    sent = 0
    go_on = asyncio.Event()

    async def vae(_requests: AsyncIterator[bytes], context: Context) -> None:
        nonlocal sent
        for _ in range(64):
            await context.write(chunk_message(0, 0, bytes(MIB)))
            sent += 1
        await context.write(USAGE)

    async def interpolation(requests: AsyncIterator[bytes], context: Context) -> None:
        await go_on.wait()
        assert len(await drain(requests)) == 65
        for message in media(b"video"):
            await context.write(message)

    async with hop(vae, interpolation) as (decode, *_):
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.5)
        assert 0 < sent < 32, "what the calls themselves hold, and no more"
        go_on.set()
        assert await decode.media() == b"video"
