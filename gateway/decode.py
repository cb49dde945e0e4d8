"""Latents to media: the VAE's call, and the interpolator's behind it where a request wants more frames.

Both run at once: frames go on to the interpolator as they leave the VAE, as the bytes they came as. Each stage is read
only as fast as the next one takes, so no clip is ever whole in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from gateway.digests import CHUNK_BYTES, Digests
from gateway.replica import Replica
from gateway.stage_calls import Latents, failed, refused
from gateway.work import Progress, Work
from protos import gateway_pb2, interpolation_pb2, types_pb2, vae_pb2
from services.client import WRITE_FAILED
from services.errors import CorruptTensor, DeviceLost, NotReady
from services.request import MAX_MEDIA_BYTES
from services.tensor_wire import frame_of

_DECODE = "/lightloom.v1.Vae/Decode"
_INTERPOLATE = "/lightloom.v1.Interpolation/Interpolate"


class Decode:
    """A request's way from latents to media. It begins at once, and runs beside its maker; `close` it in any case.

    Args:
        progress: is told of frames, and closed.
        interpolator: of a request whose frames are to be interpolated.

    Raises:
        NotReady: one of them has left since it was chosen.
    """

    def __init__(
        self, work: Work, vae: Replica, latents: Latents, progress: Progress, interpolator: Replica | None = None
    ) -> None:
        self.artifact = gateway_pb2.Artifact()
        # Of media that are large; of others that is a moment's work.
        self.digests: Digests | None = None
        self.start_unix_ns = time.time_ns()
        self._work = work
        self._progress = progress
        self._data = bytearray()
        self._expected = -1
        self._relayed = False
        self._whole = asyncio.Event()
        self._usages: dict[str, types_pb2.StageUsage] = {}
        frames_only = interpolator is not None
        requests = self._decode_requests(latents, frames_only)
        self._calls = [vae.call("stream_stream", _DECODE, requests, **work.call_options())]
        try:
            if interpolator is not None:
                self._calls.append(interpolator.call("stream_stream", _INTERPOLATE, **work.call_options()))
        except NotReady:
            self._calls[0].cancel()
            raise
        self._task = asyncio.create_task(self._run(vae, interpolator))
        self._task.add_done_callback(lambda _task: self._whole.set())

    async def media(self) -> bytearray:
        """The encoded media, as soon as its last byte is here.

        Raises:
            ServiceError: a call failed before.
        """
        await self._whole.wait()
        if self._task.done():
            self._task.result()
        return self._data

    async def ended(self) -> dict[str, types_pb2.StageUsage]:
        """What each stage spent, at the end of the calls.

        Raises:
            ServiceError: a call failed.
        """
        await self._task
        return self._usages

    async def close(self) -> None:
        """Ends what still runs."""
        for call in self._calls:
            call.cancel()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self.digests is not None:
            self.digests.close()
        await self._progress.close()

    async def _run(self, vae: Replica, interpolator: Replica | None) -> None:
        """All calls at once; the first that fails says why, and ends the other."""
        tasks = [asyncio.create_task(self._take_media(interpolator or vae))]
        if interpolator is not None:
            tasks.append(asyncio.create_task(self._relay(vae)))
        try:
            await asyncio.gather(*tasks)
        finally:
            for call in self._calls:
                call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _relay(self, vae: Replica) -> None:
        """The VAE's frames to the interpolator."""
        decode, interpolate = self._calls
        with vae.in_use(self._work.batch):
            try:
                await _write(interpolate, self._interpolate_start())
                async for message in decode:
                    if frame_of(message) is not None:
                        await _write(interpolate, message)
                        self._relayed = True
                    else:
                        self._ends(vae, vae_pb2.DecodeResponse.FromString(message).usage)
            except grpc.aio.AioRpcError as failure:
                raise failed(vae, failure) from failure
            except CorruptTensor as error:
                raise refused(vae, error) from None
        await interpolate.done_writing()

    async def _take_media(self, replica: Replica) -> None:
        """What the last call answers: media, and what it spent."""
        with replica.in_use(self._work.batch):
            try:
                async for message in self._calls[-1]:
                    await self._take(replica, vae_pb2.DecodeResponse.FromString(message))
            except grpc.aio.AioRpcError as failure:
                error = failed(replica, failure)
                if self._relayed and failure.details() == WRITE_FAILED:
                    # What it ended with is lost to a frame that was under way, but it had begun: that is an attempt.
                    error = DeviceLost("the interpolator's call ended while frames were sent")
                raise error from failure
            except CorruptTensor as error:
                raise refused(replica, error) from None
        if len(self._data) != self._expected:
            cut = CorruptTensor(f"the {replica.stage} announced {self._expected} bytes and sent {len(self._data)}")
            raise refused(replica, cut)

    async def _take(self, replica: Replica, response: vae_pb2.DecodeResponse) -> None:
        match response.WhichOneof("kind"):
            case "media":
                header, artifact = response.media, self.artifact
                if self._expected >= 0 or header.nbytes > MAX_MEDIA_BYTES:
                    raise CorruptTensor(
                        f"the {replica.stage} announced media twice, or {header.nbytes} bytes: too many"
                    )
                self._expected = header.nbytes
                artifact.mime, artifact.width, artifact.height = header.mime, header.width, header.height
                artifact.num_frames, artifact.fps = header.num_frames, header.fps
                self.digests = Digests() if header.nbytes > CHUNK_BYTES else None
            case "chunk":
                data = response.chunk.data
                if len(self._data) + len(data) > self._expected:
                    raise CorruptTensor(f"the {replica.stage} announced {self._expected} bytes and sent more")
                self._data += data
                if self.digests is not None:
                    await self.digests.add(data)
                if len(self._data) == self._expected:
                    self._whole.set()
            case "frames":
                self._progress.frames(response.frames)
            case "usage":
                self._ends(replica, response.usage)

    def _ends(self, replica: Replica, usage: types_pb2.StageUsage) -> None:
        self._usages[replica.stage] = usage
        replica.took(usage, self._work.params)

    async def _decode_requests(self, latents: Latents, frames_only: bool) -> AsyncIterator[bytes]:
        start = vae_pb2.DecodeStart(context=self._work.context(), params=self._work.params, frames_only=frames_only)
        del start.params.inputs[:]
        yield vae_pb2.DecodeRequest(start=start).SerializeToString()
        async for message in latents.follow():
            yield message

    def _interpolate_start(self) -> bytes:
        params = self._work.params
        start = interpolation_pb2.InterpolateStart(
            context=self._work.context(),
            params=params,
            exponent=params.frame_interpolation_exp,
            scale=params.frame_interpolation_scale,
            num_frames=params.num_frames,
        )
        del start.params.inputs[:]
        return interpolation_pb2.InterpolateRequest(start=start).SerializeToString()


async def _write(call: Any, message: bytes) -> None:
    # Who reads from a call that has ended hears why.
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(message)
