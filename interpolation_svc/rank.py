"""The interpolator's rank: frames in, encoded media with more frames out."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace

import torch

from interpolation_svc.engine import (
    InterpolationChunk,
    InterpolationJob,
    InterpolationResult,
    open_engine,
    weights_of,
)
from protos import interpolation_pb2, types_pb2, vae_pb2
from services.clip_bundles import piece_of
from services.clip_writer import ClipWriter
from services.config import StageConfig, parse
from services.describe import placement
from services.errors import CorruptTensor, InvalidRequest
from services.failures import failure_of
from services.media_answer import MediaAnswer
from services.rank_process import Call, run
from services.request import InterpolationLimits, ResolvedParams, check_interpolation, interpolated_frames
from services.sound import Sound
from services.telemetry import make_span
from services.tensor_wire import frame_of
from services.tensors import BundleReader
from services.wire import interpolation_limits_to_proto, parsing, resolved_from_proto

MAX_BUNDLE_BYTES = 512 * 1024 * 1024
# Frames that may wait here; then who sends more waits.
MAX_WAITING_BYTES = 128 * 1024 * 1024
# A call that comes while the encoder alone works waits that long at most.
LOOK_EVERY_S = 0.02
# Frames are taken again: that is seen so soon.
ROOM_EVERY_S = 0.005


class Opened:
    """A call whose frames come, are interpolated and encoded, all at once."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.reader = BundleReader(MAX_BUNDLE_BYTES)
        self.started_ns = 0
        self.params: ResolvedParams | None = None
        self.fps = 0.0
        self.num_frames = 0
        # What has come and is not yet encoded.
        self.sound: Sound | None = None
        self.media: MediaAnswer | None = None

    def is_full(self) -> bool:
        """Whether the encoder takes no more frames now, or the caller not all that was encoded."""
        return self.media is not None and not self.call.cancelled and self.media.is_full()


class InterpolationProgram:
    """RankProgram of the service."""

    def __init__(self, config: StageConfig) -> None:
        self._config = config
        self._limits = parse(InterpolationLimits, config.limits, "limits.")
        self._engine = open_engine(config)
        self._open: dict[str, Opened] = {}
        self._interpolated: list[InterpolationResult] = []

    def describe(self) -> types_pb2.DescribeResponse:
        """This replica; it names no model, as it takes the clips of any."""
        device, dtype = placement(self._config.model)
        digest = hashlib.sha256(weights_of(self._config).read_bytes()).hexdigest()
        return types_pb2.DescribeResponse(
            stage=types_pb2.STAGE_INTERPOLATION,
            component_id=f"interpolation-{digest[:12]}",
            family="rife",
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            dtype=str(dtype).removeprefix("torch."),
            interpolation_limits=interpolation_limits_to_proto(self._limits),
        )

    def opened(self, call: Call) -> None:
        """A clip begins."""
        self._open[str(call.id)] = Opened(call)

    def message(self, call: Call, data: bytes) -> None:
        """Parameters, or a frame of a bundle of frames."""
        if call.cancelled:
            return
        opened = self._open[str(call.id)]
        frame = frame_of(data)
        if frame is None:
            with parsing():
                start = interpolation_pb2.InterpolateRequest.FromString(data).start
            self._start(opened, start)
        elif opened.params is None:
            raise CorruptTensor("frames came before the parameters")
        elif (bundle := opened.reader.feed(frame)) is not None:
            opened.started_ns = opened.started_ns or time.time_ns()
            frames, sound = piece_of(bundle)
            if sound is not None:
                opened.sound = sound if opened.sound is None else opened.sound.then(sound)
            self._engine.add(str(call.id), frames)
            while self._engine.waiting_bytes > MAX_WAITING_BYTES:
                self.tick()

    def _start(self, opened: Opened, start: interpolation_pb2.InterpolateStart) -> None:
        if opened.params is not None:
            raise InvalidRequest("the call has two starts")
        wanted = replace(
            resolved_from_proto(start.params),
            num_frames=start.num_frames,
            frame_interpolation_exp=start.exponent,
            frame_interpolation_scale=start.scale,
        )
        if wanted.num_frames < 1:
            raise InvalidRequest("num_frames is 0: a clip has one frame at least", param="num_frames")
        check_interpolation(wanted, self._limits)
        key = str(opened.call.id)
        opened.params = wanted
        opened.fps = wanted.fps * 2**start.exponent
        self._engine.submit(
            InterpolationJob(key, wanted.width, wanted.height, start.num_frames, start.exponent, start.scale)
        )
        num_frames = interpolated_frames(wanted)
        header = types_pb2.MediaHeader(width=wanted.width, height=wanted.height, num_frames=num_frames, fps=opened.fps)
        writer = ClipWriter(wanted.output_format, wanted.quality, opened.fps, num_frames)
        opened.media = MediaAnswer(opened.call, header, writer)

    def half_closed(self, call: Call) -> None:
        """All frames must have come by now."""
        if not self._engine.whole(str(call.id)):
            raise CorruptTensor("the stream ended before all frames had come")
        if self._open[str(call.id)].params is None:
            raise InvalidRequest("the call ended before its start")

    def cancelled(self, call: Call) -> None:
        """Forgets the clip."""
        self._engine.abort(str(call.id))
        self._forget(str(call.id))

    def tick(self) -> bool:
        """One batch of pictures. A clip that is still being encoded is answered once it is, beside the others."""
        interpolated, self._interpolated = self._interpolated, []
        full = {key for key, opened in self._open.items() if opened.is_full()}
        events = self._engine.tick(full)
        if full and not events and self._engine.busy:
            time.sleep(ROOM_EVERY_S)
        for event in events:
            opened = self._open.get(event.job.request_id)
            if opened is None:
                continue
            if opened.call.cancelled:
                self.cancelled(opened.call)
            elif isinstance(event, InterpolationResult):
                if opened.media is not None:
                    opened.media.end()
                interpolated.append(event)
            else:
                self._encode(opened, event)
        for result in interpolated:
            self._end(result)
        return self._engine.busy or bool(self._interpolated)

    def _end(self, result: InterpolationResult) -> None:
        opened = self._open.get(result.job.request_id)
        if opened is None:
            return
        if result.error is None and opened.media is not None and not self._sendable(opened.media):
            self._interpolated.append(result)
            return
        self._answer(opened, result)
        self._forget(result.job.request_id)

    def _sendable(self, media: MediaAnswer) -> bool:
        """Whether the clip is encoded, and the caller has taken so much of it that the rest can be sent at once."""
        if not media.is_done(0.0 if self._engine.busy else LOOK_EVERY_S):
            return False
        media.send_some()
        if media.is_full() and not self._engine.busy:
            time.sleep(ROOM_EVERY_S)
        return not media.is_full()

    def _encode(self, opened: Opened, chunk: InterpolationChunk) -> None:
        assert opened.media is not None
        opened.media.add(chunk.frames.numpy(), opened.sound)
        opened.sound = None
        opened.num_frames += len(chunk.frames)
        opened.call.send(vae_pb2.DecodeResponse(frames=opened.num_frames).SerializeToString())

    def _forget(self, key: str) -> None:
        opened = self._open.pop(key, None)
        if opened is not None and opened.media is not None:
            opened.media.close()

    def _answer(self, opened: Opened, result: InterpolationResult) -> None:
        call = opened.call
        if result.error is not None:
            call.fail(result.error)
            return
        assert opened.media is not None
        try:
            opened.media.send_rest()
        except Exception as error:  # noqa: BLE001 - one call fails, the others go on
            call.fail(failure_of(error, call.request_id))
            return
        span = make_span("interpolate", self._config.service.name, opened.started_ns, time.time_ns())
        usage = types_pb2.StageUsage(busy_s=result.busy_s + opened.media.behind_s, spans=[span])
        call.send(vae_pb2.DecodeResponse(usage=usage).SerializeToString())
        call.finish()

    def metrics(self) -> dict[str, float]:
        """The engine's."""
        return self._engine.metrics()

    def drain(self) -> None:
        """What runs is short: it is finished."""


if __name__ == "__main__":
    run(InterpolationProgram)
