"""A rank without a model that behaves and misbehaves on request, to test what stands around ranks.

`model.preset` says how it starts; the prompt of a Denoise call says what the call does:

    echo      sends every bundle back, then finishes
    steps     sends `steps` events, 20 ms each
    wait      never ends by itself; sends one event first
    flood     sends `steps` MiB of tensors
    sleep     holds the main thread for `steps` tenths of a second, then echoes
    trace     sends its traceparent as a preview
    refuse    raises InvalidRequest          bug        raises ValueError
    tickbug   raises in tick                 kill       kills the rank
    hang      never returns from tick
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from protos import dit_pb2, types_pb2
from services.config import StageConfig
from services.errors import InvalidRequest, StartupError
from services.rank_process import Call, run
from services.tensor_wire import frame_of
from services.tensors import Bundle, BundleReader


@dataclass(slots=True)
class Job:
    """A call and what it has had so far."""

    call: Call
    reader: BundleReader = field(default_factory=BundleReader)
    bundles: list[Bundle] = field(default_factory=list)
    start: dit_pb2.DenoiseStart = field(default_factory=dit_pb2.DenoiseStart)
    step: int = 0
    complete: bool = False


class FakeProgram:
    """A RankProgram."""

    def __init__(self, config: StageConfig) -> None:
        marker = Path(config.model.source)
        match config.model.preset:
            case "no weights":
                raise StartupError("model folder nowhere has no weights")
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            case "slow" | "never":
                time.sleep(1.0 if config.model.preset == "slow" else 3600)
            case "crash at second start":
                starts = int(marker.read_text()) + 1 if marker.exists() else 1
                marker.write_text(str(starts))
                if starts == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                if starts == 3:
                    raise StartupError("the weights are gone for a moment")
        self._jobs: dict[int, Job] = {}
        self._cancelled = 0
        self._draining = False

    def describe(self) -> types_pb2.DescribeResponse:
        """A little of everything."""
        return types_pb2.DescribeResponse(
            stage=types_pb2.STAGE_DIT, component_id="fake", family="fake", models=["fake"], device=str(os.getpid())
        )

    def opened(self, call: Call) -> None:
        """Notes the call."""
        self._jobs[call.id] = Job(call)

    def message(self, call: Call, data: bytes) -> None:
        """Start, or a piece of a bundle."""
        job = self._jobs[call.id]
        frame = frame_of(data)
        if frame is not None:
            if bundle := job.reader.feed(frame):
                job.bundles.append(bundle)
            return
        job.start = dit_pb2.DenoiseRequest.FromString(data).start
        match job.start.params.prompt:
            case "refuse":
                raise InvalidRequest("steps is 0: it must be between 1 and 4", param="steps")
            case "bug":
                raise ValueError("a secret of the implementation")
            case "wait":
                self._event(job)

    def half_closed(self, call: Call) -> None:
        """The caller has sent all."""
        self._jobs[call.id].complete = True

    def cancelled(self, call: Call) -> None:
        """Forgets the call."""
        self._cancelled += 1
        self._jobs.pop(call.id, None)

    def tick(self) -> bool:
        """One piece of every job; True while one is left that does not merely wait."""
        for job in list(self._jobs.values()):
            if job.complete or job.start.params.prompt in ("hang", "kill", "tickbug"):
                self._work(job)
        return any(job.complete and job.start.params.prompt != "wait" for job in self._jobs.values())

    def metrics(self) -> dict[str, float]:
        """Jobs held now, and cancelled since the start."""
        return {"jobs": float(len(self._jobs)), "cancelled_total": float(self._cancelled)}

    def drain(self) -> None:
        """Everything but `wait` ends by itself."""
        self._draining = True

    def _work(self, job: Job) -> None:
        match job.start.params.prompt:
            case "echo":
                for bundle in job.bundles:
                    job.call.send_tensors(bundle.tensors, bundle.attributes)
                self._finish(job)
            case "steps":
                time.sleep(0.02)
                self._event(job)
                if job.step == job.start.params.steps:
                    self._finish(job)
            case "flood":
                for index in range(job.start.params.steps):
                    job.call.send_tensors({"x": torch.full((1024, 1024), index % 256, dtype=torch.uint8)})
                self._finish(job)
            case "sleep":
                time.sleep(job.start.params.steps / 10)
                job.start.params.prompt = "echo"
            case "trace":
                preview = types_pb2.Media(mime="text/plain", data=job.call.traceparent.encode())
                job.call.send(dit_pb2.DenoiseResponse(preview=preview).SerializeToString())
                self._finish(job)
            case "tickbug":
                raise KeyError("tick")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600)

    def _event(self, job: Job) -> None:
        job.step += 1
        event = dit_pb2.StepEvent(step=job.step, total=job.start.params.steps)
        job.call.send(dit_pb2.DenoiseResponse(step=event).SerializeToString())

    def _finish(self, job: Job) -> None:
        job.call.send(dit_pb2.DenoiseResponse(usage=types_pb2.StageUsage(busy_s=1.0)).SerializeToString())
        job.call.finish()
        del self._jobs[job.call.id]


if __name__ == "__main__":
    run(FakeProgram)
