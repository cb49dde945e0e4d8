"""The VAE's engine: latents to encoded media, pictures to latents; requests of equal shape in one batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from services.errors import InvalidRequest, NonFinite, OutOfMemory, ServiceError
from services.failures import failure_of
from services.family import ChunkWithSound, Frames, Tensors, VaeModel, VaePart
from services.media import clips_of, decode_inputs
from services.parallel.mesh import Axis
from services.request import ResolvedParams
from services.sound import Sound
from vae_svc.input_clips import SharedClips
from vae_svc.latent_rgb_fit import LatentRgbFit

# How often it is seen whether clips have been read, where nothing else is to be done.
READ_EVERY_S = 0.005
# One is worked on; others wait for whoever takes their frames, each with its clip's history (Wan at 480p: 1.8 GiB).
MAX_BEGUN = 4


@dataclass(frozen=True, slots=True)
class VaeJob:
    """A decode (with latents), or an encode of `params.inputs` (without)."""

    request_id: str
    params: ResolvedParams
    latents: Tensors | None = None


@dataclass(frozen=True, slots=True)
class VaeChunk:
    """The next frames of a job's clip, [F, H, W, 3]; a picture is one chunk of one frame, only sound alone has none."""

    job: VaeJob
    first_frame: int
    frames: Frames
    sound: Sound | None = None


@dataclass(frozen=True, slots=True)
class VaeResult:
    """The end of a job: all its chunks have been given, or here are the tensors of an encode, or an error."""

    job: VaeJob
    busy_s: float
    tensors: Tensors = field(default_factory=dict)
    error: ServiceError | None = None


@dataclass(slots=True, eq=False)
class _Decode:
    """What is in work: jobs of one shape, what they have given and will give, and the ids of those that have ended."""

    jobs: list[VaeJob]
    chunks: Iterator[torch.Tensor | ChunkWithSound] | None = None
    first_frame: int = 0
    first_sound: Sound | None = None
    # By job: of a clip, what came before the frames that it goes with.
    early_sounds: dict[str, Sound] = field(default_factory=dict)
    given: bool = False
    busy_s: float = 0.0
    ended: set[str] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        """Whether all frames have been given, so that only its end is missing."""
        return self.first_frame >= self.jobs[0].params.num_frames

    def waits(self, full: Collection[str]) -> bool:
        """Whether it has frames to come, and one of its jobs is among those."""
        if self.whole:
            return False
        return any(job.request_id in full and job.request_id not in self.ended for job in self.jobs)


class VaeEngine:
    """Jobs wait in order; a tick encodes one, or decodes the next chunk of frames of the jobs in work.

    Pictures of one shape are decoded together. Clips come alone: together they gain nothing and take each its memory.
    But while nobody takes the frames of one, others go on, the one that began first before all. Between two chunks of
    a clip comes an encode or a picture, if one waits.
    On several ranks, each of which gets the same calls, all chunks and results are equal on all of them.

    Args:
        rgb_fit: for previews, None where the VAE makes none possible.
        axis: of the ranks that work together, None for a rank of its own.
    """

    def __init__(
        self,
        part: VaePart,
        model: VaeModel,
        max_batch: int,
        rgb_fit: LatentRgbFit | None = None,
        *,
        axis: Axis | None = None,
    ) -> None:
        self.rgb_fit = rgb_fit
        self._part = part
        self._model = model
        self._max_batch = max_batch
        self._axis = axis
        self._waiting: deque[VaeJob] = deque()
        # With its clips, which are read once.
        self._retried: deque[tuple[VaeJob, Sequence[Frames]]] = deque()
        self._begun: list[_Decode] = []
        self._reading: tuple[VaeJob, SharedClips] | None = None
        self._clip_is_next = False

    @property
    def busy(self) -> bool:
        """Whether there is work."""
        return bool(self._waiting or self._retried or self._begun or self._reading)

    def submit(self, job: VaeJob) -> None:
        """Queues a job."""
        self._waiting.append(job)

    def abort(self, request_id: str) -> None:
        """Forgets a job. One that is in work gives no more chunks."""
        if self._reading is not None and self._reading[0].request_id == request_id:
            self._reading[1].close()
            self._reading = None
        self._waiting = deque(job for job in self._waiting if job.request_id != request_id)
        self._retried = deque(retried for retried in self._retried if retried[0].request_id != request_id)
        for decode in self._begun:
            if any(job.request_id == request_id for job in decode.jobs):
                decode.ended.add(request_id)
        self._begun = [
            decode for decode in self._begun if not decode.ended.issuperset(job.request_id for job in decode.jobs)
        ]

    def tick(self, full: Collection[str] = ()) -> list[VaeChunk | VaeResult]:
        """Works on one chunk, or encodes.

        Args:
            full: request ids of which nobody takes frames now. They get none.
        """
        ready = [decode for decode in self._begun if not decode.waits(full)]
        if (whole := next((decode for decode in ready if decode.whole), None)) is not None:
            return self._step(whole)
        # A picture is whole after its one chunk.
        clip = next(iter(ready), None)
        events = None
        if clip is None or not self._clip_is_next:
            events = self._begin(beside_clip=clip is not None)
        self._clip_is_next = clip is not None and events is not None
        if events is not None:
            return events
        return [] if clip is None else self._step(clip)

    def _begin(self, *, beside_clip: bool) -> list[VaeChunk | VaeResult] | None:
        """The next job that is not in work, beside a clip only an encode or a picture; None where there is none."""
        if self._reading is not None and (events := self._encode_clips(*self._reading)) is not None:
            return events
        if self._retried:
            # Alone, each of those that failed together fails for its own reasons only.
            return None if self._begun else self._begin_again(*self._retried.popleft())
        jobs = self._next_jobs(beside_clip=beside_clip)
        if not jobs:
            return None
        return self._begin_encode(jobs[0]) if jobs[0].latents is None else self._begin_decode(jobs)

    def _begin_again(self, job: VaeJob, clips: Sequence[Frames]) -> list[VaeChunk | VaeResult]:
        return self._encode(job, clips) if job.latents is None else self._begin_decode([job])

    def _begin_decode(self, jobs: list[VaeJob]) -> list[VaeChunk | VaeResult]:
        self._begun.append(_Decode(jobs))
        return self._step(self._begun[-1])

    def _next_jobs(self, *, beside_clip: bool) -> list[VaeJob]:
        """Taken from those that wait: the first that may begin, or the pictures that are decoded with it."""
        if len(self._begun) >= MAX_BEGUN:
            return []
        may_begin = (job for job in self._waiting if self._may_begin(job, beside_clip=beside_clip))
        if (first := next(may_begin, None)) is None:
            return []
        jobs = [first]
        if first.latents is not None and first.params.num_frames == 1:
            jobs = [job for job in self._waiting if _shape(job) == _shape(first)][: self._max_batch]
        self._waiting = deque(job for job in self._waiting if job not in jobs)
        return jobs

    def _may_begin(self, job: VaeJob, *, beside_clip: bool) -> bool:
        if job.latents is None:
            # Clips of one job at a time are read.
            return self._reading is None or not clips_of(job.params.inputs)
        return job.params.num_frames == 1 or not beside_clip

    def _begin_encode(self, job: VaeJob) -> list[VaeChunk | VaeResult]:
        """Clips are read first, and others go on meanwhile."""
        if clips := clips_of(job.params.inputs):
            self._reading = job, SharedClips(clips, job.params.num_frames, self._axis)
            return []
        return self._encode(job)

    def _encode_clips(self, job: VaeJob, shared: SharedClips) -> list[VaeChunk | VaeResult] | None:
        """None while they are being read."""
        try:
            clips = shared.look()
        except ServiceError as error:
            self._reading = None
            return [VaeResult(job, 0.0, error=error)]
        if clips is None:
            return None
        self._reading = None
        return self._encode(job, clips)

    def _encode(self, job: VaeJob, clips: Sequence[Frames] = ()) -> list[VaeChunk | VaeResult]:
        start_s = time.perf_counter()
        failure: ServiceError | None = None
        tensors: Tensors = {}
        try:
            if not job.params.inputs:
                raise InvalidRequest("there is no input picture to encode", param="inputs")
            alpha = self._part.alpha(self._model)
            inputs = decode_inputs(job.params.inputs, job.params.num_frames, alpha=alpha, clips=clips)
            tensors = self._part.encode(self._model, inputs, job.params)
        except Exception as error:  # noqa: BLE001 - one job fails, the others go on
            failure = self._failure(error)
        if self._begun and isinstance(failure, OutOfMemory):
            self._retried.append((job, clips))
            return []
        return [VaeResult(job, time.perf_counter() - start_s, tensors, failure)]

    def _step(self, running: _Decode) -> list[VaeChunk | VaeResult]:
        start_s = time.perf_counter()
        failure: ServiceError | None = None
        try:
            if running.chunks is None:
                rows = [job.latents for job in running.jobs if job.latents is not None]
                running.chunks = self._part.decode(self._model, rows, running.jobs[0].params)
            chunk = next(running.chunks, None)
            made = [] if chunk is None else _on_host(chunk)
            for _, _, sound in made[:1]:
                running.first_sound = running.first_sound or sound
                if running.first_sound is not None and sound is not None:
                    running.first_sound.check_next(sound)
        except Exception as error:  # noqa: BLE001 - as of an encode
            failure = self._failure(error)
        running.busy_s += time.perf_counter() - start_s
        if failure is not None:
            return self._give_up(running, failure)
        if chunk is None:
            self._begun.remove(running)
            return [VaeResult(job, running.busy_s) for job in running.jobs if job.request_id not in running.ended]
        events: list[VaeChunk | VaeResult] = []
        for job, (good, frames, sound) in zip(running.jobs, made, strict=True):
            if job.request_id in running.ended:
                continue
            if good:
                events.extend(_chunk_of(running, job, frames, sound))
                continue
            black = NonFinite("the decoded picture or sound has values that are not finite")
            events.append(VaeResult(job, running.busy_s, error=black))
            self.abort(job.request_id)
        running.first_frame += len(made[0][1])
        running.given = True
        return events

    def _give_up(self, running: _Decode, failure: ServiceError) -> list[VaeChunk | VaeResult]:
        self._begun.remove(running)
        left = [job for job in running.jobs if job.request_id not in running.ended]
        too_much = bool(self._begun) and isinstance(failure, OutOfMemory)
        if running.given or (len(running.jobs) == 1 and not too_much):
            return [VaeResult(job, running.busy_s, error=failure) for job in left]
        self._retried.extend((job, ()) for job in left)
        return []

    def _failure(self, error: Exception) -> ServiceError:
        # On one rank of several, the others are past this point: the group ends and starts anew.
        if not (self._axis is None or isinstance(error, ServiceError)):
            raise error
        return failure_of(error)

    def metrics(self) -> dict[str, float]:
        """Jobs that wait."""
        return {"vae_waiting": len(self._waiting)}


def _chunk_of(running: _Decode, job: VaeJob, frames: Frames, sound: Sound | None) -> list[VaeChunk]:
    """None of a clip's sound that comes before frames: it goes with them."""
    early = running.early_sounds.pop(job.request_id, None)
    if early is not None:
        sound = early if sound is None else early.then(sound)
    # Of all that is made, clips alone have a rate.
    if len(frames) or not job.params.fps:
        return [VaeChunk(job, running.first_frame, frames, sound)]
    if sound is not None:
        running.early_sounds[job.request_id] = sound
    return []


def encode_alone(engine: VaeEngine, job: VaeJob) -> Tensors:
    """What an encode gives, of an engine that has nothing else to do.

    Raises:
        ServiceError: what it failed with.
    """
    engine.submit(job)
    while not (events := engine.tick()):
        time.sleep(READ_EVERY_S)
    [result] = events
    assert isinstance(result, VaeResult)
    if result.error is not None:
        raise result.error
    return result.tensors


def _on_host(chunk: torch.Tensor | ChunkWithSound) -> list[tuple[bool, Frames, Sound | None]]:
    """For each job: whether all values are finite, its frames and its sound."""
    if not isinstance(chunk, ChunkWithSound):
        return [(good, frames, None) for good, frames in zip(_finite(chunk), to_pixels(chunk), strict=True)]
    finite = [a and b for a, b in zip(_finite(chunk.frames), _finite(chunk.samples), strict=True)]
    sounds = (Sound(samples, chunk.sampling_rate) for samples in chunk.samples.float().cpu().numpy())
    return list(zip(finite, to_pixels(chunk.frames), sounds, strict=True))


def _finite(values: torch.Tensor) -> list[bool]:
    good: list[bool] = torch.isfinite(values).flatten(1).all(1).tolist()
    return good


def to_pixels(frames: torch.Tensor) -> np.ndarray:
    """[B, F, 3, H, W] in [-1, 1] to uint8 [B, F, H, W, 3], rounded as the stock image processor does."""
    scaled = (frames / 2 + 0.5).clamp(0, 1).float().permute(0, 1, 3, 4, 2)
    pixels: np.ndarray = (scaled * 255).round().to(torch.uint8, memory_format=torch.contiguous_format).cpu().numpy()
    return pixels


def _shape(job: VaeJob) -> tuple[Any, ...]:
    if job.latents is None:
        return ()
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(job.latents.items()))
    return (job.params.width, job.params.height, job.params.num_frames, *shapes)
