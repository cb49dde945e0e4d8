"""The VAE's engine: latents to encoded media, pictures to latents; requests of equal shape in one batch."""

from __future__ import annotations

import inspect
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from services.config import StageConfig
from services.describe import open_model, placement
from services.device_memory import failure_of
from services.errors import InvalidRequest, NonFinite, ServiceError
from services.families import load_family
from services.family import Frames, Tensors, VaePart
from services.media import decode_image, encode_frames
from services.request import ResolvedParams
from vae_svc.latent_rgb_fit import LatentRgbFit, fit_latent_rgb


@dataclass(frozen=True, slots=True)
class VaeJob:
    """A decode (with latents), or an encode of `params.inputs` (without). `frames_only`: no encoded media."""

    request_id: str
    params: ResolvedParams
    latents: Tensors | None = None
    frames_only: bool = False


@dataclass(frozen=True, slots=True)
class VaeResult:
    """What became of a job: frames [F, H, W, 3], media as (mime, bytes), tensors of an encode, or an error."""

    job: VaeJob
    busy_s: float
    frames: Frames | None = None
    media: tuple[str, bytes] | None = None
    tensors: Tensors = field(default_factory=dict)
    error: ServiceError | None = None


class VaeEngine:
    """Jobs wait in order; a tick takes the first and, when it decodes, the others of its shape.

    `rgb_fit` is for previews, None where the VAE makes none possible.
    """

    def __init__(self, part: VaePart, model: Any, max_batch: int, rgb_fit: LatentRgbFit | None = None) -> None:
        self.rgb_fit = rgb_fit
        self._part = part
        self._model = model
        self._max_batch = max_batch
        self._waiting: deque[VaeJob] = deque()

    @property
    def busy(self) -> bool:
        """Whether jobs wait."""
        return bool(self._waiting)

    def submit(self, job: VaeJob) -> None:
        """Queues a job."""
        self._waiting.append(job)

    def abort(self, request_id: str) -> None:
        """Forgets a job that waits."""
        self._waiting = deque(job for job in self._waiting if job.request_id != request_id)

    def tick(self) -> list[VaeResult]:
        """Works on one batch."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        if first.latents is None:
            return [self._encode(self._waiting.popleft())]
        jobs = [job for job in self._waiting if _shape(job) == _shape(first)][: self._max_batch]
        self._waiting = deque(job for job in self._waiting if job not in jobs)
        return self._decode(jobs)

    def _encode(self, job: VaeJob) -> VaeResult:
        start_s = time.perf_counter()
        try:
            pictures = [decode_image(media) for media in job.params.inputs if media.role == "image"]
            if not pictures:
                raise InvalidRequest("there is no input picture to encode", param="inputs")
            tensors = self._part.encode(self._model, pictures, job.params)
        except (ServiceError, torch.OutOfMemoryError) as error:
            return VaeResult(job, time.perf_counter() - start_s, error=failure_of(error))
        return VaeResult(job, time.perf_counter() - start_s, tensors=tensors)

    def _decode(self, jobs: list[VaeJob]) -> list[VaeResult]:
        start_s = time.perf_counter()
        failure: ServiceError | None = None
        try:
            rows = [job.latents for job in jobs if job.latents is not None]
            floats = self._part.decode(self._model, rows, jobs[0].params)
            finite = torch.isfinite(floats).flatten(1).all(1).tolist()
            pixels = to_pixels(floats)
        except (ServiceError, torch.OutOfMemoryError) as error:
            failure = failure_of(error)
        # Outside of the handler, where the exception holds none of the memory that was too little.
        if failure is not None and len(jobs) > 1:
            # Alone, each job fails for its own reasons only.
            return [result for job in jobs for result in self._decode([job])]
        if failure is not None:
            return [VaeResult(jobs[0], time.perf_counter() - start_s, error=failure)]
        shared_s = time.perf_counter() - start_s
        results = []
        for job, good, frames in zip(jobs, finite, pixels, strict=True):
            own_s = time.perf_counter()
            if not good:
                black = NonFinite("the decoded picture has values that are not finite", request_id=job.request_id)
                results.append(VaeResult(job, shared_s, error=black))
                continue
            media = None
            if not job.frames_only:
                media = encode_frames(frames, job.params.output_format, job.params.quality, job.params.fps)
            busy_s = shared_s + time.perf_counter() - own_s
            results.append(VaeResult(job, busy_s, frames=frames, media=media))
        return results

    def metrics(self) -> dict[str, float]:
        """Jobs that wait."""
        return {"vae_waiting": len(self._waiting)}


def to_pixels(frames: torch.Tensor) -> np.ndarray:
    """[B, F, 3, H, W] in [-1, 1] to uint8 [B, F, H, W, 3], rounded as the stock image processor does."""
    scaled = (frames / 2 + 0.5).clamp(0, 1).float().permute(0, 1, 3, 4, 2)
    pixels: np.ndarray = (scaled * 255).round().to(torch.uint8).cpu().numpy()
    return pixels


def open_engine(config: StageConfig) -> VaeEngine:
    """Loads the VAE that a config names.

    Raises:
        StartupError: its weights cannot be served.
    """
    source = open_model(config.model)
    part = load_family(source.family).vae
    model = part.load(source, *placement(config.model))
    if config.engine.tile_px:
        enable_tiling(model, config.engine.tile_px)
    return VaeEngine(part, model, config.engine.max_batch, fit_latent_rgb(part, model))


def enable_tiling(model: Any, side_px: int) -> None:
    """Tiles of `side_px` that overlap by a quarter. The library's VAEs say the same in two ways."""
    if "tile_sample_min_height" in inspect.signature(model.enable_tiling).parameters:
        stride_px = side_px * 3 // 4
        model.enable_tiling(
            tile_sample_min_height=side_px,
            tile_sample_min_width=side_px,
            tile_sample_stride_height=stride_px,
            tile_sample_stride_width=stride_px,
        )
        return
    model.enable_tiling()
    model.tile_overlap_factor = 0.25
    model.tile_sample_min_size = side_px
    model.tile_latent_min_size = side_px // 2 ** (len(model.config.block_out_channels) - 1)


def _shape(job: VaeJob) -> tuple[Any, ...]:
    if job.latents is None:
        return ()
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(job.latents.items()))
    return (job.params.width, job.params.height, job.params.num_frames, *shapes)
