"""The VAE's rank: latents in, media out; pictures in, latents out."""

from __future__ import annotations

import time

from protos import text_encoder_pb2, types_pb2, vae_pb2
from services.clip_bundles import messages_of
from services.clip_writer import ClipWriter
from services.config import StageConfig
from services.describe import describe, limits_of, open_model
from services.errors import CorruptTensor
from services.failures import failure_of
from services.media_answer import MediaAnswer
from services.parallel.mesh import Mesh
from services.rank_process import Call, run
from services.request import ResolvedParams
from services.telemetry import make_span
from services.tensor_wire import frame_of
from services.tensors import BundleReader
from services.wire import checked_from_proto, parsing
from vae_svc.engine import VaeChunk, VaeJob, VaeResult
from vae_svc.loading import open_engine

SUBFOLDERS = ("vae",)
MAX_LATENT_BYTES = 1024**3
# A call that comes while the encoder alone works waits that long at most.
LOOK_EVERY_S = 0.02
# Frames are taken again: that is seen so soon.
ROOM_EVERY_S = 0.005


class Opened:
    """A call whose tensors are still coming, or whose job is in work."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.reader = BundleReader(MAX_LATENT_BYTES)
        self.params: ResolvedParams | None = None
        self.frames_only = False
        self.queued_ns = 0
        self.num_frames = 0
        self.media: MediaAnswer | None = None


class VaeProgram:
    """RankProgram of the service."""

    def __init__(self, config: StageConfig, mesh: Mesh | None = None) -> None:
        self._config = config
        self._limits = limits_of(config, open_model(config.model)).of_any_model()
        self._sound_alone = self._limits.output == "audio"
        self._engine = open_engine(config, mesh)
        # Rank 0 answers for the group, so it alone encodes media.
        self._speaks = mesh is None or not mesh.rank
        self._open: dict[str, Opened] = {}
        self._decoded: list[VaeResult] = []

    def describe(self) -> types_pb2.DescribeResponse:
        """This replica, with the fit that its models' previews need."""
        description = describe(self._config, types_pb2.STAGE_VAE, open_model(self._config.model), SUBFOLDERS)
        if (fit := self._engine.rgb_fit) is not None:
            description.latent_rgb_fit.weight.extend(fit.weight.flatten().tolist())
            description.latent_rgb_fit.bias.extend(fit.bias.tolist())
        return description

    def opened(self, call: Call) -> None:
        """A decode or an encode begins."""
        self._open[str(call.id)] = Opened(call)

    def message(self, call: Call, data: bytes) -> None:
        """Parameters, or a frame of the latents."""
        opened = self._open[str(call.id)]
        if (job := self._job_of(opened, data)) is not None:
            opened.queued_ns = time.time_ns()
            self._engine.submit(job)

    def _job_of(self, opened: Opened, data: bytes) -> VaeJob | None:
        """The call's, once its last message has come."""
        key = str(opened.call.id)
        if opened.call.method == "Encode":
            with parsing():
                asked = text_encoder_pb2.EncodeRequest.FromString(data)
                return VaeJob(key, checked_from_proto(asked.params, self._limits))
        frame = frame_of(data)
        if frame is None:
            with parsing():
                start = vae_pb2.DecodeRequest.FromString(data).start
                opened.params = checked_from_proto(start.params, self._limits)
            opened.frames_only = start.frames_only
        elif (bundle := opened.reader.feed(frame)) is not None and opened.params is not None:
            return VaeJob(key, opened.params, bundle.tensors)
        return None

    def half_closed(self, call: Call) -> None:
        """A decode must have its latents by now."""
        if not self._open[str(call.id)].queued_ns:
            raise CorruptTensor("the stream ended before the latents were whole")

    def cancelled(self, call: Call) -> None:
        """Forgets the job."""
        self._engine.abort(str(call.id))
        self._forget(str(call.id))

    def tick(self) -> bool:
        """One chunk of frames. What has been decoded is encoded beside the next chunks, and answered then."""
        decoded, self._decoded = self._decoded, []
        full = {key for key, opened in self._open.items() if not opened.call.has_room}
        for opened in self._open.values():
            if opened.media is not None:
                opened.media.send_some()
        events = self._engine.tick(full)
        for event in events:
            of_event = self._open.get(event.job.request_id)
            if of_event is None:
                continue
            if isinstance(event, VaeChunk):
                self._take_frames(of_event, event)
            elif event.error is None and event.job.latents is not None:
                self._decoded.append(event)
                if of_event.media is not None:
                    of_event.media.end()
            else:
                self._end(event)
        for result in decoded:
            # Equal on all ranks, of which one encodes and sends.
            if result.job.request_id in full:
                self._decoded.append(result)
            else:
                self._end(result)
        busy = self._engine.busy or bool(self._decoded)
        if busy and not events:
            self._wait()
        return busy

    def _wait(self) -> None:
        """For a moment: nobody takes what is or could be made, or an encoder has yet to end."""
        timeout_s = ROOM_EVERY_S if self._engine.busy else LOOK_EVERY_S
        for result in self._decoded:
            opened = self._open.get(result.job.request_id)
            if opened is not None and opened.media is not None and not opened.media.is_done():
                opened.media.is_done(timeout_s)
                return
        if self._engine.busy or self._speaks:
            time.sleep(ROOM_EVERY_S)

    def _end(self, result: VaeResult) -> None:
        if (opened := self._open.get(result.job.request_id)) is not None:
            self._answer(opened, result)
            self._forget(result.job.request_id)

    def _forget(self, key: str) -> None:
        opened = self._open.pop(key, None)
        if opened is not None and opened.media is not None:
            opened.media.close()
            # They hold each other, and a file may be large: it must not wait for the collector of garbage.
            opened.call.watch(None)

    def _take_frames(self, opened: Opened, chunk: VaeChunk) -> None:
        """Frames leave as they come, for an interpolator or raw, or are encoded while later ones are decoded."""
        if self._speaks:
            opened.media = opened.media or _answer_of(opened, chunk, sound_alone=self._sound_alone)
            if opened.frames_only:
                num_bytes = chunk.frames.nbytes + (0 if chunk.sound is None else chunk.sound.samples.nbytes)
                opened.media.add_messages(messages_of(chunk.frames, chunk.sound), num_bytes)
            else:
                opened.media.add(chunk.frames, chunk.sound)
        opened.num_frames += len(chunk.frames)
        if chunk.job.params.num_frames > 1 and not opened.frames_only:
            opened.call.send(vae_pb2.DecodeResponse(frames=opened.num_frames).SerializeToString())

    def _answer(self, opened: Opened, result: VaeResult) -> None:
        call = opened.call
        if result.error is not None:
            call.fail(result.error)
            return
        if result.tensors:
            call.send_tensors(result.tensors)
        elif opened.media is not None:
            try:
                opened.media.send_rest()
            except Exception as error:  # noqa: BLE001 - one call fails, the others of the batch or group go on
                call.fail(failure_of(error, call.request_id))
                return
        span = make_span(f"vae.{call.method.lower()}", self._config.service.name, opened.queued_ns, time.time_ns())
        # The stage works on the request, too, while the encoder alone does.
        encoding_s = 0.0 if opened.media is None else opened.media.behind_s
        usage = types_pb2.StageUsage(busy_s=result.busy_s + encoding_s, spans=[span])
        # Both response types have the usage in field 3.
        call.send(vae_pb2.DecodeResponse(usage=usage).SerializeToString())
        call.finish()

    def metrics(self) -> dict[str, float]:
        """The engine's."""
        return self._engine.metrics()

    def drain(self) -> None:
        """What waits is short: it is finished."""


def _answer_of(opened: Opened, chunk: VaeChunk, *, sound_alone: bool) -> MediaAnswer:
    """Where the frames go of which these are the first."""
    params, (height, width) = chunk.job.params, chunk.frames.shape[1:3]
    num_frames = 0 if sound_alone else params.num_frames
    header = types_pb2.MediaHeader(width=width, height=height, num_frames=num_frames, fps=params.fps)
    writer = None
    # Of raw frames it is known how many bytes they will be, of raw sound it is not.
    if not opened.frames_only and (params.output_format != "raw" or sound_alone):
        writer = ClipWriter(params.output_format, params.quality, params.fps, num_frames)
    media = MediaAnswer(opened.call, header, writer)
    opened.call.watch(media.is_full)
    return media


if __name__ == "__main__":
    run(VaeProgram)
