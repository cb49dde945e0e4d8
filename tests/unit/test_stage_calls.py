"""What a stage may send of one request: no more than it announced, and no more than a gateway can hold."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import pytest

from gateway import stage_calls
from gateway.decode import Decode
from gateway.records import Claim
from gateway.replica import Replica
from gateway.stage_calls import Latents, failed
from gateway.work import Progress, Work
from protos import types_pb2, vae_pb2
from services.client import connect
from services.errors import CorruptTensor, DeadlineExceeded, NotReady
from services.request import MAX_MEDIA_BYTES
from services.tensor_wire import frame_of, message_of

CHUNK = message_of(types_pb2.TensorFrame(chunk=types_pb2.TensorChunk(data=b"abc")).SerializeToString())
END = message_of(types_pb2.TensorFrame(end=types_pb2.TensorEnd()).SerializeToString())


def add(latents: Latents, message: bytes) -> None:
    frame = frame_of(message)
    assert frame is not None
    latents.add(message, frame)


def test_nothing_follows_whole_latents() -> None:
    latents = Latents()
    add(latents, CHUNK)
    add(latents, END)
    with pytest.raises(CorruptTensor, match="follows"):
        add(latents, CHUNK)
    assert latents.messages == [CHUNK, END]


def test_latents_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_calls, "MAX_LATENTS_BYTES", 2 * len(CHUNK))
    latents = Latents()
    add(latents, CHUNK)
    add(latents, CHUNK)
    with pytest.raises(CorruptTensor, match="more than"):
        add(latents, CHUNK)


class Channel:
    """A VAE that answers with these messages."""

    def __init__(self, *answers: vae_pb2.DecodeResponse) -> None:
        self._answers = answers
        self.cancelled = False

    def stream_stream(self, _method: str) -> Any:
        return lambda *_arguments, **_options: self

    unary_stream = stream_stream

    async def __aiter__(self) -> Any:
        for answer in self._answers:
            yield answer.SerializeToString()

    def cancel(self) -> None:
        self.cancelled = True


def header(nbytes: int) -> vae_pb2.DecodeResponse:
    return vae_pb2.DecodeResponse(media=types_pb2.MediaHeader(mime="image/png", nbytes=nbytes))


def chunk(data: bytes) -> vae_pb2.DecodeResponse:
    return vae_pb2.DecodeResponse(chunk=types_pb2.MediaChunk(data=data))


@pytest.mark.parametrize(
    "answers",
    [
        (header(MAX_MEDIA_BYTES + 1),),
        (header(3), header(4)),
        (header(3), chunk(b"ab"), chunk(b"cd")),
        (chunk(b"ab"), header(2)),
        (header(3), chunk(b"ab")),
    ],
    ids=["too large", "announced twice", "more", "before its header", "less"],
)
async def test_media_come_as_announced(answers: tuple[vae_pb2.DecodeResponse, ...]) -> None:
    channel = Channel(*answers)
    replica: Any = stage_calls.Replica("vae", "nowhere", cast(Any, channel))
    work = Work(Claim("r", 1, {}, "", 0), types_pb2.GenerationParams(), 0.0, "")
    decode = Decode(work, replica, Latents(), Progress(cast(Any, None), work.claim, 1.0))
    with pytest.raises(CorruptTensor):
        await decode.media()
    assert channel.cancelled
    await decode.close()


async def left(stage: str) -> Any:
    """A replica that was chosen, and has gone from its list since."""
    channel = grpc.aio.insecure_channel("127.0.0.1:9")
    await channel.close()
    return stage_calls.Replica(stage, "127.0.0.1:9", channel)


async def test_a_replica_that_left_between_choice_and_call_is_not_ready() -> None:
    """And no bug, which would fail the request."""
    work = Work(Claim("r", 1, {}, "", 0), types_pb2.GenerationParams(), 0.0, "")
    feed = stage_calls.Feed(work, [], None, None)
    with pytest.raises(NotReady, match="left"):
        await anext(stage_calls.denoise(work, await left("dit"), feed, Latents()))
    encoder, vae = Channel(), Channel()
    there: Any = stage_calls.Replica("text_encoder", "nowhere", cast(Any, encoder))
    with pytest.raises(NotReady, match="left"):
        stage_calls.Feed(work, [there, await left("vae")], None, None)
    assert encoder.cancelled and not there.ours
    decoder: Any = stage_calls.Replica("vae", "nowhere", cast(Any, vae))
    progress = Progress(cast(Any, None), work.claim, 1.0)
    with pytest.raises(NotReady, match="left"):
        Decode(work, decoder, Latents(), progress, await left("interpolation"))
    assert vae.cancelled


async def test_a_stage_that_is_late_is_named() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with connect(address) as channel:
            replica = Replica("vae", address, channel)
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await channel.unary_unary("/lightloom.v1.Vae/Describe")(b"", timeout=0.3)
            error = failed(replica, late.value)
    assert isinstance(error, DeadlineExceeded)
    assert error.message == "the request's deadline passed before the vae had answered"
    # It was the request that had too little time.
    assert replica.paused_until_s == 0.0
