"""The rank of a stage that sleeps instead of computing, for benchmarks of everything around the stages.

The three stages share it; `model.preset` of the config names the stage. The denoiser sleeps 20 ms a step and serves
its requests one after the other, as an engine with full batches of one would; the others answer at once.
"""

from __future__ import annotations

import io
import time
from collections import deque
from dataclasses import dataclass, field

import torch
from PIL import Image

from protos import dit_pb2, text_encoder_pb2, types_pb2, vae_pb2
from services.config import StageConfig
from services.rank_process import Call, run
from services.tensor_wire import frame_of, is_end

STEP_S = 0.020
LIMITS = types_pb2.Limits(
    size_multiple_px=16,
    min_side_px=64,
    max_side_px=1024,
    max_pixels=1024 * 1024,
    max_frames=1,
    frame_multiple=1,
    max_steps=200,
    max_guidance=30,
    max_prompt_chars=1000,
    default_width=256,
    default_height=256,
    default_frames=1,
    default_steps=20,
    default_guidance=4.0,
    default_negative_prompt=" ",
    output="image",
)
STAGES = {
    "text_encoder": types_pb2.STAGE_TEXT_ENCODER,
    "dit": types_pb2.STAGE_DIT,
    "vae": types_pb2.STAGE_VAE,
}


@dataclass(slots=True)
class Job:
    """A call in work: how many steps it wants and has had."""

    call: Call
    total: int = 1
    step: int = 0
    bundles: int = 0
    started: float = field(default_factory=time.perf_counter)


def description(config: StageConfig, family: str) -> types_pb2.DescribeResponse:
    """What a stage without a model says of itself: one component for each stage, whatever the replica."""
    stage = config.model.preset
    return types_pb2.DescribeResponse(
        protocol_version=1,
        stage=STAGES[stage],
        component_id=f"{stage}-{family}",
        family=family,
        variants=["t2i"],
        models=[config.model.name],
        limits=LIMITS,
        device="none",
        dtype="float32",
        world_size=1,
    )


class SleepingProgram:
    """A RankProgram without a model."""

    def __init__(self, config: StageConfig) -> None:
        self._config = config
        self._waiting: dict[int, Job] = {}
        self._ready: deque[Job] = deque()

    def describe(self) -> types_pb2.DescribeResponse:
        """One component for each stage, whatever the replica."""
        return description(self._config, "sleeping")

    def opened(self, call: Call) -> None:
        """A new call."""
        self._waiting[call.id] = Job(call)

    def message(self, call: Call, data: bytes) -> None:
        """Encode starts at its only message, the others when their tensors have come."""
        job = self._waiting.get(call.id)
        if job is None:
            return
        frame = frame_of(data)
        if frame is None:
            self._start(job, data)
        elif is_end(frame):
            job.bundles -= 1
            if job.bundles == 0:
                self._ready.append(self._waiting.pop(call.id))

    def _start(self, job: Job, data: bytes) -> None:
        match self._config.model.preset:
            case "text_encoder":
                self._ready.append(self._waiting.pop(job.call.id))
            case "dit":
                start = dit_pb2.DenoiseRequest.FromString(data).start
                job.total, job.bundles = start.params.steps, start.num_bundles
            case _:
                job.bundles = 1

    def half_closed(self, call: Call) -> None:
        """Nothing to do: the calls end by themselves."""

    def cancelled(self, call: Call) -> None:
        """Forgets the call."""
        self._waiting.pop(call.id, None)

    def tick(self) -> bool:
        """One step of the first job."""
        while self._ready and self._ready[0].call.cancelled:
            self._ready.popleft()
        if self._ready:
            job = self._ready[0]
            {"text_encoder": self._encode, "dit": self._denoise, "vae": self._decode}[self._config.model.preset](job)
        return bool(self._ready)

    def _encode(self, job: Job) -> None:
        job.call.send_tensors({"positive/prompt_embeds": torch.zeros(1, 16, 64)})
        self._finish(job, text_encoder_pb2.EncodeResponse(usage=types_pb2.StageUsage()).SerializeToString())

    def _denoise(self, job: Job) -> None:
        if job.step == 0:
            job.started = time.perf_counter()
        time.sleep(STEP_S)
        job.step += 1
        event = dit_pb2.StepEvent(
            step=job.step, total=job.total, sigma=1 - job.step / job.total, seconds=STEP_S, batch=1
        )
        job.call.send(dit_pb2.DenoiseResponse(step=event).SerializeToString())
        if job.step == job.total:
            bundle = dit_pb2.BundleStart(kind=dit_pb2.BundleStart.KIND_LATENTS, step=job.step)
            job.call.send(dit_pb2.DenoiseResponse(bundle=bundle).SerializeToString())
            job.call.send_tensors({"latents": torch.zeros(1, 256, 64)})
            usage = types_pb2.StageUsage(busy_s=time.perf_counter() - job.started)
            self._finish(job, dit_pb2.DenoiseResponse(usage=usage).SerializeToString())

    def _decode(self, job: Job) -> None:
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "PNG")
        data = file.getvalue()
        header = types_pb2.MediaHeader(mime="image/png", width=16, height=16, num_frames=1, nbytes=len(data))
        job.call.send(vae_pb2.DecodeResponse(media=header).SerializeToString())
        job.call.send(vae_pb2.DecodeResponse(chunk=types_pb2.MediaChunk(data=data)).SerializeToString())
        self._finish(job, vae_pb2.DecodeResponse(usage=types_pb2.StageUsage()).SerializeToString())

    def _finish(self, job: Job, usage: bytes) -> None:
        job.call.send(usage)
        job.call.finish()
        self._ready.popleft()

    def metrics(self) -> dict[str, float]:
        """Jobs that wait or run."""
        return {"jobs": float(len(self._waiting) + len(self._ready))}

    def drain(self) -> None:
        """Everything runs to its end."""


if __name__ == "__main__":
    run(SleepingProgram)
