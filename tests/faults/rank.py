"""The rank of a stage that sleeps instead of computing, and writes down what it does.

The stages share it; `model.preset` of the config names the stage, `model.source` the folder for its records. A picture
is a function of prompt, seed, steps and size alone, through every tensor on its way: one that was lost, mixed up,
changed or counted twice shows. The prompt "poison" ends the denoiser's process in its tenth step.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from benchmarks.sleeping_rank import STEP_S, description
from protos import dit_pb2, text_encoder_pb2, types_pb2, vae_pb2
from services.config import StageConfig
from services.errors import NotReady
from services.rank_process import Call, run
from services.tensor_wire import frame_of
from services.tensors import BundleReader
from tests.faults.history import Recorder

POISON = "poison"
POISONED_STEP = 10
# Of float32 a pixel: 1024 x 1024 makes latents of 20 MiB.
LATENTS_A_PIXEL = 5
EMBEDDING = 64
PICTURE_PX = 16


@dataclass(slots=True)
class Job:
    """A call in work."""

    call: Call
    reader: BundleReader = field(default_factory=BundleReader)
    context: types_pb2.RequestContext = field(default_factory=types_pb2.RequestContext)
    params: types_pb2.GenerationParams = field(default_factory=types_pb2.GenerationParams)
    bundles: int = 1
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0
    # What was asked for: a checkpoint, and to let go of the request behind it.
    checkpoint: bool = False
    leave: bool = False


class RecordingProgram:
    """A RankProgram without a model: one job after the other, denoisers a step of each in turn."""

    def __init__(self, config: StageConfig) -> None:
        self._config = config
        self._stage = config.model.preset
        self._name = config.service.name
        self._records = Recorder(Path(config.model.source) / f"{self._name}-{os.getpid()}.jsonl")
        self._waiting: dict[int, Job] = {}
        self._ready: deque[Job] = deque()
        self._leaving = False

    def describe(self) -> types_pb2.DescribeResponse:
        """One component for each stage, whatever the replica."""
        return description(self._config, "recording")

    def opened(self, call: Call) -> None:
        """A new call."""
        self._waiting[call.id] = Job(call)

    def message(self, call: Call, data: bytes) -> None:
        """The start, then frames, of which a checkpoint is the last; with all of them the job is ready."""
        job = self._waiting.get(call.id)
        frame = frame_of(data)
        if job is None:
            self._asked(call, data)
            return
        if frame is None:
            self._start(job, data)
        elif bundle := job.reader.feed(frame):
            job.tensors |= bundle.tensors
            job.step = int(bundle.attributes.get("step", "0"))
            job.bundles -= 1
        if not job.bundles:
            self._ready.append(self._waiting.pop(call.id))

    def _asked(self, call: Call, data: bytes) -> None:
        request = dit_pb2.DenoiseRequest.FromString(data)
        for job in self._ready:
            if job.call is call:
                job.checkpoint, job.leave = True, request.checkpoint.stop

    def _start(self, job: Job, data: bytes) -> None:
        if self._stage == "text_encoder":
            start = text_encoder_pb2.EncodeRequest.FromString(data)
            job.bundles = 0
        elif self._stage == "dit":
            start = dit_pb2.DenoiseRequest.FromString(data).start
            job.bundles = start.num_bundles + start.resume
        else:
            start = vae_pb2.DecodeRequest.FromString(data).start
        if self._leaving:
            raise NotReady("the replica is leaving", retry_after_s=1.0)
        job.context, job.params = start.context, start.params
        self._record("begin", job)

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
            {"text_encoder": self._encode, "dit": self._denoise, "vae": self._decode}[self._stage](self._ready[0])
        return bool(self._ready)

    def _encode(self, job: Job) -> None:
        seed = int.from_bytes(hashlib.sha256(job.params.prompt.encode()).digest()[:4])
        job.call.send_tensors({"positive/prompt_embeds": _noise(seed, EMBEDDING)})
        self._finish(job, text_encoder_pb2.EncodeResponse(usage=types_pb2.StageUsage()).SerializeToString())

    def _denoise(self, job: Job) -> None:
        params = job.params
        if job.leave:
            self._hand_back(job)
            return
        if "latents" not in job.tensors:
            job.tensors["latents"] = _noise(params.seed, LATENTS_A_PIXEL * params.width * params.height)
        time.sleep(STEP_S)
        job.step += 1
        self._record("step", job, step=job.step)
        if params.prompt == POISON and job.step == POISONED_STEP:
            os._exit(1)
        condition = job.tensors["positive/prompt_embeds"]
        job.tensors["latents"].view(-1, EMBEDDING).mul_(0.75).add_(condition, alpha=1 / job.step)
        event = dit_pb2.StepEvent(
            step=job.step, total=params.steps, sigma=1 - job.step / params.steps, seconds=STEP_S, batch=1
        )
        job.call.send(dit_pb2.DenoiseResponse(step=event).SerializeToString())
        if job.step == params.steps:
            self._send_latents(job, dit_pb2.BundleStart.KIND_LATENTS)
            self._finish(job, dit_pb2.DenoiseResponse(usage=types_pb2.StageUsage(busy_s=0.0)).SerializeToString())
            return
        if job.checkpoint:
            job.checkpoint = False
            self._send_latents(job, dit_pb2.BundleStart.KIND_CHECKPOINT)
        self._ready.rotate(-1)

    def _hand_back(self, job: Job) -> None:
        """With a checkpoint, or as it came when it has not begun."""
        self._ready.popleft()
        if job.step:
            self._send_latents(job, dit_pb2.BundleStart.KIND_CHECKPOINT)
            job.call.finish()
        else:
            job.call.fail(NotReady("the replica is leaving", retry_after_s=1.0))

    def _send_latents(self, job: Job, kind: dit_pb2.BundleStart.Kind) -> None:
        bundle = dit_pb2.BundleStart(kind=kind, step=job.step)
        job.call.send(dit_pb2.DenoiseResponse(bundle=bundle).SerializeToString())
        job.call.send_tensors({"latents": job.tensors["latents"]}, {"step": str(job.step)})

    def _decode(self, job: Job) -> None:
        pixels = hashlib.shake_256(job.tensors["latents"].numpy().tobytes()).digest(3 * PICTURE_PX**2)
        file = io.BytesIO()
        Image.frombytes("RGB", (PICTURE_PX, PICTURE_PX), pixels).save(file, "PNG")
        data = file.getvalue()
        header = types_pb2.MediaHeader(
            mime="image/png", width=PICTURE_PX, height=PICTURE_PX, num_frames=1, nbytes=len(data)
        )
        job.call.send(vae_pb2.DecodeResponse(media=header).SerializeToString())
        job.call.send(vae_pb2.DecodeResponse(chunk=types_pb2.MediaChunk(data=data)).SerializeToString())
        self._finish(job, vae_pb2.DecodeResponse(usage=types_pb2.StageUsage()).SerializeToString())

    def _finish(self, job: Job, usage: bytes) -> None:
        job.call.send(usage)
        job.call.finish()
        self._ready.popleft()

    def _record(self, kind: str, job: Job, **fields: int) -> None:
        self._records.write(
            kind, replica=self._name, pid=os.getpid(), id=job.context.request_id, fence=job.context.fence, **fields
        )

    def metrics(self) -> dict[str, float]:
        """Jobs that wait or run."""
        return {"jobs": float(len(self._waiting) + sum(not job.call.cancelled for job in self._ready))}

    def drain(self) -> None:
        """A denoiser hands its requests back; elsewhere everything runs to its end."""
        self._leaving = self._stage == "dit"
        for job in (*self._ready, *self._waiting.values()) if self._leaving else ():
            job.leave = True


def _noise(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    run(RecordingProgram)
