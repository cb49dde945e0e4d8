"""What a client is told of a clip's frames: a gateway that answers by a script, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lightloom import client
from lightloom.client import AsyncClient, Progress
from protos import gateway_pb2, gateway_pb2_grpc, types_pb2
from services.server import bind, create_server

FRAMES_S = 0.02


class ScriptedGateway(gateway_pb2_grpc.GatewayServicer):
    """A clip of 9 frames, interpolated once; while it is decoded, 3 are made."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()

    def _status(self, state: gateway_pb2.RequestState, frames: int = 0) -> gateway_pb2.RequestStatus:
        params = types_pb2.GenerationParams(num_frames=9, enable_frame_interpolation=True, frame_interpolation_exp=1)
        status = gateway_pb2.RequestStatus(request_id="r", state=state, params=params, step=2, total_steps=2)
        status.frames = frames
        return status

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[gateway_pb2.GenerateResponse]:  # noqa: N802
        running = self._status(gateway_pb2.REQUEST_STATE_RUNNING)
        yield gateway_pb2.GenerateResponse(request_id="r", event_id="1-0", status=running)
        await self._asked.wait()
        # The answer is on its way.
        await asyncio.sleep(10 * FRAMES_S)
        done = self._status(gateway_pb2.REQUEST_STATE_DONE)
        yield gateway_pb2.GenerateResponse(request_id="r", event_id="2-0", status=done)
        for piece in (b"a", b"b"):
            await asyncio.sleep(5 * FRAMES_S)
            yield gateway_pb2.GenerateResponse(request_id="r", chunk=types_pb2.MediaChunk(data=piece))

    async def Get(self, request: Any, context: Any) -> gateway_pb2.GetResponse:  # noqa: N802
        self._asked.set()
        return gateway_pb2.GetResponse(status=self._status(gateway_pb2.REQUEST_STATE_RUNNING, frames=3))


@pytest.fixture
async def gateway(monkeypatch) -> AsyncIterator[AsyncClient]:
    monkeypatch.setattr(client, "FRAMES_EVERY_S", FRAMES_S)
    server = create_server()
    gateway_pb2_grpc.add_GatewayServicer_to_server(ScriptedGateway(), server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    async with AsyncClient(f"127.0.0.1:{port}") as asked:
        yield asked
    await server.stop(None)


async def test_frames_are_told_until_the_end_and_not_behind_it(gateway) -> None:
    seen: list[Progress] = []
    result = await gateway.generate("x", num_frames=9, on_progress=seen.append)
    assert result.data == b"ab"
    assert {(event.frames, event.total_frames) for event in seen if event.frames} == {(3, 17)}
    assert [event.state for event in seen][-1] == "done"


async def test_what_is_raised_about_frames_ends_the_call(gateway) -> None:
    def show(progress: Progress) -> None:
        if progress.frames:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        await gateway.generate("x", num_frames=9, on_progress=show)
