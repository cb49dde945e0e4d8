"""The interpolator's engine: clips of many requests, each a chunk of frames at a time.

Clips take turns, a batch each, so a short one does not wait for a long one that came before it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from interpolation_svc.clip import Clip
from interpolation_svc.ifnet import IFNet
from interpolation_svc.weights import PACKAGED, load_ifnet
from services.config import StageConfig
from services.describe import placement
from services.errors import CorruptTensor, ServiceError, StartupError
from services.failures import failure_of

PACKAGED_NAME = "packaged"
WARMUP_PX = 64


@dataclass(frozen=True, slots=True)
class InterpolationJob:
    """A clip of `num_frames` frames, width x height pixels; `exponent` and `scale` as in `Clip`."""

    request_id: str
    width: int
    height: int
    num_frames: int
    exponent: int
    scale: float


@dataclass(frozen=True, slots=True)
class InterpolationChunk:
    """The next frames of a job's clip, uint8 [n, H, W, 3] on the CPU."""

    job: InterpolationJob
    frames: torch.Tensor


@dataclass(frozen=True, slots=True)
class InterpolationResult:
    """The end of a job: all its chunks have been given, or here is why not."""

    job: InterpolationJob
    busy_s: float
    error: ServiceError | None = None


@dataclass(slots=True)
class _Running:
    """A job in work: frames that wait, and what the frames in work still give."""

    job: InterpolationJob
    clip: Clip
    waiting: deque[torch.Tensor] = field(default_factory=deque)
    chunks: Iterator[torch.Tensor] | None = None
    taken: int = 0
    waiting_bytes: int = 0
    busy_s: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether no frame is missing."""
        return self.taken == self.job.num_frames

    @property
    def has_work(self) -> bool:
        """Whether there is something to do now."""
        return self.chunks is not None or bool(self.waiting) or self.whole


class InterpolationEngine:
    """Makes frames between frames. A tick works on one batch of the clip whose turn it is."""

    def __init__(self, net: IFNet, max_batch: int) -> None:
        self._net = net
        self._max_batch = max_batch
        self._running: dict[str, _Running] = {}

    @property
    def busy(self) -> bool:
        """Whether there is work that waits for nobody."""
        return any(running.has_work for running in self._running.values())

    @property
    def waiting_bytes(self) -> int:
        """Frames that came in and have not been worked on."""
        return sum(running.waiting_bytes for running in self._running.values())

    def submit(self, job: InterpolationJob) -> None:
        """Begins a clip, whose frames follow."""
        self._running[job.request_id] = _Running(job, Clip(self._net, job.exponent, job.scale, self._max_batch))

    def add(self, request_id: str, frames: torch.Tensor) -> None:
        """The next frames of a clip, uint8 [F, H, W, 3]; those of a job that has ended are dropped.

        Raises:
            CorruptTensor: other frames than the job announced.
        """
        running = self._running.get(request_id)
        if running is None:
            return
        job = running.job
        if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[1:] != (job.height, job.width, 3):
            raise CorruptTensor(
                f"the frames are {frames.dtype} of shape {list(frames.shape)}: they must be uint8, "
                f"[F, {job.height}, {job.width}, 3]"
            )
        if not 0 < len(frames) <= job.num_frames - running.taken:
            raise CorruptTensor(f"{running.taken + len(frames)} frames came, {job.num_frames} were announced")
        running.taken += len(frames)
        running.waiting_bytes += frames.nbytes
        running.waiting.append(frames)

    def abort(self, request_id: str) -> None:
        """Forgets a clip."""
        self._running.pop(request_id, None)

    def whole(self, request_id: str) -> bool:
        """Whether all frames of a clip have come; also of one that has ended."""
        running = self._running.get(request_id)
        return running is None or running.whole

    def tick(self, full: Collection[str] = ()) -> list[InterpolationChunk | InterpolationResult]:
        """Works on one batch.

        Args:
            full: request ids of which nobody takes frames now. They get none.
        """
        ready = (running for key, running in self._running.items() if running.has_work and key not in full)
        running = next(ready, None)
        if running is None:
            return []
        key = running.job.request_id
        # To the end of the line: the others come first next time.
        self._running[key] = self._running.pop(key)
        start_s = time.perf_counter()
        failure: ServiceError | None = None
        try:
            frames = self._next(running)
        except (ServiceError, torch.OutOfMemoryError) as error:
            failure = failure_of(error)
        running.busy_s += time.perf_counter() - start_s
        if failure is not None or frames is None and running.whole and not running.waiting:
            self.abort(key)
            return [InterpolationResult(running.job, running.busy_s, failure)]
        return [] if frames is None else [InterpolationChunk(running.job, frames)]

    def _next(self, running: _Running) -> torch.Tensor | None:
        """The next chunk; None when the frames in work have given all theirs."""
        if running.chunks is None and running.waiting:
            frames = running.waiting.popleft()
            running.waiting_bytes -= frames.nbytes
            running.chunks = running.clip.add(frames)
        chunk = next(running.chunks, None) if running.chunks is not None else None
        if chunk is None:
            running.chunks = None
        return chunk

    def metrics(self) -> dict[str, float]:
        """Clips in work, and bytes of frames that wait."""
        return {"interpolation_clips": len(self._running), "interpolation_waiting_bytes": self.waiting_bytes}


def open_engine(config: StageConfig) -> InterpolationEngine:
    """Loads the weights that a config names, and makes a first picture with them.

    Raises:
        StartupError: they cannot be served.
    """
    device, dtype = placement(config.model)
    net = load_ifnet(weights_of(config), dtype).to(device)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.engine.warmup:
        frames = torch.zeros(2, WARMUP_PX, WARMUP_PX, 3, dtype=torch.uint8)
        with torch.inference_mode():
            for _ in Clip(net, 1, 1.0, config.engine.max_batch).add(frames):
                """The device is ready then: its libraries are loaded, its memory pool has begun."""
    return InterpolationEngine(net, config.engine.max_batch)


def weights_of(config: StageConfig) -> Path:
    """The file that `model.source` names; `packaged` is the one in this folder.

    Raises:
        StartupError: there is none.
    """
    path = PACKAGED if config.model.source == PACKAGED_NAME else Path(config.model.source)
    if not path.is_file():
        raise StartupError(
            f"the interpolator's weights {path.absolute()} do not exist: model.source names a file of IFNet's weights "
            "(docs/interpolation.md)"
        )
    return path
