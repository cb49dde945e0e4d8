"""The gRPC calls of a request to its stages. Tensor frames are relayed as the bytes they came as.

What can run side by side does: embeddings are made while the denoiser's call opens, and the VAE's call opens while the
latents still come (`gateway/decode.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import Any

import grpc

from gateway.checkpoints import Checkpoint
from gateway.replica import Replica
from gateway.scripts import heed_cancel
from gateway.work import Work
from protos import dit_pb2, text_encoder_pb2, types_pb2
from services.client import error_from_rpc
from services.errors import CorruptTensor, DeadlineExceeded, NotReady, ServiceError
from services.telemetry import internal_error
from services.tensor_wire import frame_of, is_end

_ENCODE = {"text_encoder": "/lightloom.v1.TextEncoder/Encode", "vae": "/lightloom.v1.Vae/Encode"}
_DENOISE = "/lightloom.v1.Dit/Denoise"
_CHECKPOINT = dit_pb2.BundleStart.KIND_CHECKPOINT
# What one request may hold in the gateway's memory, whatever its stages send: many times what the largest video needs.
MAX_LATENTS_BYTES = 512 * 1024 * 1024


class Latents:
    """A bundle's messages: kept for the store, and followed by a VAE call that begins before they are whole."""

    def __init__(self, messages: Sequence[bytes] = (), *, whole: bool = False) -> None:
        self.messages = list(messages)
        self.whole = whole
        self.nbytes = sum(map(len, messages))
        self._grown = asyncio.Event()

    def add(self, message: bytes, frame: memoryview) -> None:
        """The next message, and the frame in it.

        Raises:
            CorruptTensor: the bundle is whole already, or too large.
        """
        if self.whole:
            raise CorruptTensor("a tensor frame follows the end of the latents")
        self.nbytes += len(message)
        if self.nbytes > MAX_LATENTS_BYTES:
            raise CorruptTensor(f"the latents have more than {MAX_LATENTS_BYTES} bytes")
        self.messages.append(message)
        self.whole = is_end(frame)
        self._grown.set()

    async def follow(self) -> AsyncIterator[bytes]:
        """The messages from the first on; ends with the bundle."""
        index = 0
        while True:
            while index < len(self.messages):
                yield self.messages[index]
                index += 1
            if self.whole:
                return
            self._grown.clear()
            await self._grown.wait()


async def denoise(
    work: Work, replica: Replica, feed: Feed, latents: Latents
) -> AsyncGenerator[dit_pb2.DenoiseResponse | Checkpoint]:
    """Conditions into the denoiser; yields its events and checkpoints, and collects the frames of its latents.

    It ends with the latents, or with a checkpoint for another expert.

    Raises:
        NotReady: the replica leaves, or has left; if a checkpoint came, it was the last one.
        ServiceError: what a stage failed with.
    """
    checkpoint: Latents | None = None
    start = dit_pb2.BundleStart()
    with replica.in_use(work.batch):
        call = replica.call("stream_stream", _DENOISE, **work.call_options())
        feeding = asyncio.create_task(feed.run(call))
        try:
            async for message in call:
                frame = frame_of(message)
                if frame is None:
                    response = dit_pb2.DenoiseResponse.FromString(message)
                    if response.WhichOneof("kind") == "bundle":
                        start = response.bundle
                        checkpoint = Latents() if start.kind == _CHECKPOINT else None
                    yield response
                elif checkpoint is None:
                    latents.add(message, frame)
                else:
                    checkpoint.add(message, frame)
                    if checkpoint.whole:
                        yield Checkpoint(start.step, checkpoint.messages, start.expert)
        except grpc.aio.AioRpcError as error:
            raise (feed.failure or failed(replica, error)) from error
        except CorruptTensor as error:
            raise refused(replica, error) from None
        except asyncio.CancelledError:
            # The end of the call says the same as an abort of ours, but for the count.
            heed_cancel()
            if feed.failure is not None:
                raise feed.failure from None
            raise
        finally:
            call.cancel()
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
    handed = checkpoint is not None and checkpoint.whole
    if not (handed and start.expert):
        _check_end(replica, latents, start.step if handed else None)


def _check_end(replica: Replica, latents: Latents, handed_back: int | None) -> None:
    if handed_back is not None:
        raise refused(replica, NotReady(f"the replica left: it handed the request back after step {handed_back}"))
    if not latents.whole:
        raise refused(replica, CorruptTensor("the denoiser's stream ended before its latents were whole"))


class Feed:
    """Fills a denoiser's request stream: start, embeddings, image latents, checkpoint; then what is asked of it.

    The encoders' calls begin at once.

    Args:
        encoders: replicas that make the conditions, in the order in which the denoiser wants them.
        fit: for previews.
        resume: what the request goes on from.

    Raises:
        NotReady: one of the encoders has left since it was chosen.
    """

    def __init__(
        self,
        work: Work,
        encoders: Sequence[Replica],
        fit: types_pb2.LatentRgbFit | None,
        resume: Checkpoint | None,
    ) -> None:
        self.failure: ServiceError | None = None
        self._work = work
        with contextlib.ExitStack() as calls:
            self._bundles = [calls.enter_context(_encoding(work, encoder)) for encoder in encoders]
            self._calls = calls.pop_all()
        self._resume = resume
        self._asked: asyncio.Queue[dit_pb2.CheckpointRequest] = asyncio.Queue()
        self._start = dit_pb2.DenoiseStart(
            context=work.context(), params=work.params, num_bundles=len(encoders), resume=resume is not None
        )
        del self._start.params.inputs[:]
        if fit is not None:
            self._start.latent_rgb_fit.CopyFrom(fit)

    def close(self) -> None:
        """Ends the encoders' calls, if they have not ended."""
        self._calls.close()

    def ask_checkpoint(self, *, stop: bool = False) -> None:
        """Asks for a checkpoint after the step in progress; with `stop` the replica lets go of the request then."""
        self._asked.put_nowait(dit_pb2.CheckpointRequest(stop=stop))

    async def run(self, call: Any) -> None:
        """Writes until the call ends; a failure is kept, and ends the denoiser's call."""
        try:
            with self._calls:
                await call.write(dit_pb2.DenoiseRequest(start=self._start).SerializeToString())
                for frames in self._bundles:
                    async for message in frames:
                        await call.write(message)
            for message in self._resume.messages if self._resume is not None else ():
                await call.write(message)
            while True:
                asked = await self._asked.get()
                await call.write(dit_pb2.DenoiseRequest(checkpoint=asked).SerializeToString())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The denoiser's call has ended: who reads from it hears why.
            return
        except ServiceError as error:
            self.failure = error
            call.cancel()
        except Exception as error:  # noqa: BLE001 - a bug fails its request, not the gateway
            self.failure = internal_error(error, self._work.request_id)
            call.cancel()


@contextlib.contextmanager
def _encoding(work: Work, replica: Replica) -> Iterator[AsyncIterator[bytes]]:
    """An Encode call that has begun when the block is entered; gives its frames as they come."""
    request = text_encoder_pb2.EncodeRequest(context=work.context(), params=work.params)
    with replica.in_use():
        call = replica.call("unary_stream", _ENCODE[replica.stage], request.SerializeToString(), **work.call_options())
        try:
            yield _frames(work, replica, call)
        finally:
            call.cancel()


async def _frames(work: Work, replica: Replica, call: Any) -> AsyncIterator[bytes]:
    whole = False
    try:
        async for message in call:
            frame = frame_of(message)
            if frame is not None:
                whole = is_end(frame)
                yield message
            else:
                usage = text_encoder_pb2.EncodeResponse.FromString(message).usage
                work.add(replica.stage, usage)
                if replica.stage == "text_encoder":
                    replica.took(usage, work.params)
    except grpc.aio.AioRpcError as failure:
        raise failed(replica, failure) from failure
    if not whole:
        # The denoiser would wait for the rest for ever: its stream stays open, for what is asked of it later.
        cut = CorruptTensor(f"the {replica.stage}'s stream ended before the conditions were whole")
        raise refused(replica, cut)


def failed(replica: Replica, failure: grpc.aio.AioRpcError) -> ServiceError:
    """What a replica's call failed with; the replica learns of it here."""
    error = error_from_rpc(failure)
    if isinstance(error, DeadlineExceeded):
        # gRPC's own words do not say whose deadline it was. What the stage waited for is not known here.
        return DeadlineExceeded(f"the request's deadline passed before the {replica.stage} had answered")
    return refused(replica, error)


def refused(replica: Replica, error: ServiceError) -> ServiceError:
    """A failure that is the replica's own, which learns of it here."""
    if error.retryable:
        replica.refused(error)
    return error
