"""The denoiser's rank: conditions in, step events and latents out."""

from __future__ import annotations

import time

import torch

from dit_svc.engine import (
    Checkpointed,
    DenoiseJob,
    Event,
    Failed,
    Finished,
    Previewed,
    Stepped,
)
from dit_svc.loading import open_engine
from dit_svc.preview import PreviewFit
from protos import dit_pb2, types_pb2
from services.config import StageConfig
from services.describe import describe, limits_of, open_model
from services.errors import CorruptTensor, InvalidRequest, NotReady
from services.families import load_family
from services.parallel.mesh import Mesh
from services.rank_process import Call, run
from services.request import ResolvedParams
from services.telemetry import make_span
from services.tensor_wire import frame_of
from services.tensors import Bundle, BundleReader
from services.wire import checked_from_proto, media_to_proto, parsing

SUBFOLDERS = ("transformer", "transformer_2", "scheduler")
# Step events of a request are at least this far apart: nobody watches closer, and each one wakes three processes.
STEP_EVENT_S = 0.1


class Opened:
    """A call: first its conditions come, then its request runs."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.reader = BundleReader()
        self.start: dit_pb2.DenoiseStart | None = None
        self.params: ResolvedParams | None = None
        self.bundles: list[Bundle] = []
        self.admitted_ns = 0
        self.stepped_s = 0.0
        self.last_step: bytes | None = None

    @property
    def missing(self) -> int:
        """Bundles still to come."""
        if self.start is None:
            return 1
        return self.start.num_bundles + self.start.resume - len(self.bundles)


class DitProgram:
    """RankProgram of the service."""

    def __init__(self, config: StageConfig, mesh: Mesh | None = None) -> None:
        self._config = config
        self._limits = limits_of(config, open_model(config.model)).of_any_model()
        self._engine, self._features = open_engine(config, mesh)
        self._open: dict[str, Opened] = {}
        self._leaving = False

    def describe(self) -> types_pb2.DescribeResponse:
        """This replica."""
        source, held = open_model(self._config.model), self._config.engine.expert
        experts = load_family(source.family).dit.experts(source)
        subfolders = [name for name in SUBFOLDERS if source.has(name)]
        if held:
            # Of the others' folders nothing is known here; they may not even be there.
            subfolders = [experts[held], "scheduler"]
        facts = describe(self._config, types_pb2.STAGE_DIT, source, subfolders, self._features.options)
        facts.expert = held
        facts.experts.extend(experts if held else ())
        return facts

    def opened(self, call: Call) -> None:
        """A request begins."""
        self._open[str(call.id)] = Opened(call)

    def message(self, call: Call, data: bytes) -> None:
        """Start, a frame of conditions or checkpoint, or the wish for a checkpoint."""
        opened = self._open[str(call.id)]
        request = self._read(opened, data)
        if request.WhichOneof("kind") == "checkpoint":
            self._engine.request_checkpoint(str(call.id), stop=request.checkpoint.stop)
        else:
            self._admit_when_whole(opened)

    def _read(self, opened: Opened, data: bytes) -> dit_pb2.DenoiseRequest:
        """The message, but for a frame, which goes into its bundle."""
        frame = frame_of(data)
        if frame is not None:
            bundle = opened.reader.feed(frame)
            if bundle is not None:
                if opened.admitted_ns or opened.missing <= 0:
                    raise InvalidRequest("more tensor bundles came than the start message announced")
                opened.bundles.append(bundle)
            return dit_pb2.DenoiseRequest()
        with parsing():
            request = dit_pb2.DenoiseRequest.FromString(data)
            if request.WhichOneof("kind") == "start":
                opened.start = request.start
                opened.params = checked_from_proto(request.start.params, self._limits)
        return request

    def _admit_when_whole(self, opened: Opened) -> None:
        if opened.start is None or opened.params is None or opened.missing or opened.admitted_ns:
            return
        if self._leaving:
            raise _leaving()
        conditions = {
            name: tensor
            for bundle in opened.bundles[: opened.start.num_bundles]
            for name, tensor in bundle.tensors.items()
        }
        checkpoint = opened.bundles[-1] if opened.start.resume else None
        fit = _preview_fit(opened.start)
        opened.admitted_ns = time.time_ns()
        self._engine.admit(DenoiseJob(str(opened.call.id), opened.params, conditions, checkpoint, fit))
        opened.bundles.clear()

    def half_closed(self, call: Call) -> None:
        """The conditions must have come by now."""
        opened = self._open[str(call.id)]
        if not opened.admitted_ns:
            raise CorruptTensor("the stream ended before the conditions were whole")

    def cancelled(self, call: Call) -> None:
        """Frees the request's memory."""
        self._engine.abort(str(call.id))
        self._open.pop(str(call.id), None)

    def tick(self) -> bool:
        """One step of one batch."""
        if self._engine.busy:
            for event in self._engine.begin():
                opened = self._open.get(event.request_id)
                if opened is not None:
                    self._answer(opened, event)
            self._engine.complete()
        return self._engine.busy

    def _answer(self, opened: Opened, event: Event) -> None:
        call = opened.call
        match event:
            case Stepped():
                self._send_step(opened, event)
            case Previewed():
                call.send(dit_pb2.DenoiseResponse(preview=media_to_proto(event.media)).SerializeToString())
            case Checkpointed():
                start = dit_pb2.BundleStart(
                    kind=dit_pb2.BundleStart.KIND_CHECKPOINT, step=event.step, expert=event.expert
                )
                self._send_bundle(call, start, event.tensors, event.attributes)
                if event.expert:
                    self._send_usage(opened, event.busy_s)
                if event.stopped:
                    self._close(opened)
            case Finished():
                total = opened.params.steps if opened.params else 0
                start = dit_pb2.BundleStart(kind=dit_pb2.BundleStart.KIND_LATENTS, step=total)
                self._send_bundle(call, start, event.tensors, {})
                # Behind the latents, which the next stage waits for.
                if opened.last_step is not None:
                    call.send(opened.last_step)
                self._send_usage(opened, event.busy_s)
                self._close(opened)
            case Failed():
                self._open.pop(str(call.id), None)
                call.fail(event.error)

    def _send_step(self, opened: Opened, event: Stepped) -> None:
        now_s = time.monotonic()
        # The last but one lets the gateway open the next stage's call in time.
        if event.step not in (1, event.total - 1, event.total) and now_s - opened.stepped_s < STEP_EVENT_S:
            return
        opened.stepped_s = now_s
        step = dit_pb2.StepEvent(
            step=event.step, total=event.total, sigma=event.sigma, seconds=event.seconds, batch=event.batch
        )
        response = dit_pb2.DenoiseResponse(step=step).SerializeToString()
        if event.step == event.total:
            opened.last_step = response
        else:
            opened.call.send(response)

    def _send_bundle(
        self,
        call: Call,
        start: dit_pb2.BundleStart,
        tensors: dict[str, torch.Tensor],
        attributes: dict[str, str],
    ) -> None:
        call.send(dit_pb2.DenoiseResponse(bundle=start).SerializeToString())
        call.send_tensors(tensors, attributes)

    def _send_usage(self, opened: Opened, busy_s: float) -> None:
        span = make_span("dit.denoise", self._config.service.name, opened.admitted_ns, time.time_ns())
        usage = types_pb2.StageUsage(busy_s=busy_s, spans=[span])
        opened.call.send(dit_pb2.DenoiseResponse(usage=usage).SerializeToString())

    def _close(self, opened: Opened) -> None:
        self._open.pop(str(opened.call.id), None)
        opened.call.finish()

    def metrics(self) -> dict[str, float]:
        """The engine's and the features'."""
        return self._engine.metrics() | self._features.metrics()

    def drain(self) -> None:
        """Hands every request back: with a checkpoint, or as it came when it has not begun."""
        self._leaving = True
        for opened in list(self._open.values()):
            if opened.admitted_ns:
                self._engine.request_checkpoint(str(opened.call.id), stop=True)
            else:
                self._open.pop(str(opened.call.id))
                opened.call.fail(_leaving())


def _leaving() -> NotReady:
    return NotReady("the replica is leaving", retry_after_s=1.0)


def _preview_fit(start: dit_pb2.DenoiseStart) -> PreviewFit | None:
    if not start.HasField("latent_rgb_fit"):
        return None
    fit = start.latent_rgb_fit
    if len(fit.bias) != 3 or not fit.weight or len(fit.weight) % 3:
        raise InvalidRequest("latent_rgb_fit must have 3 biases and a weight of [channels, 3]")
    return PreviewFit(torch.tensor(fit.weight).view(-1, 3), torch.tensor(fit.bias))


if __name__ == "__main__":
    run(DitProgram)
