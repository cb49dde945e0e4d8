"""The denoise loop: the only one there is.

A tick takes one batch of requests one step further: collate, embed, blocks, head for the guidance branches, combine,
scheduler step. Requests join and leave between ticks, so abort and checkpoint cost one step at most. The engine knows
families through their functions and features not at all: they have acted on the block list before it starts.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from dit_svc.batching import StrideScheduler
from dit_svc.checkpoint import restore_state, save_state
from dit_svc.forward import Forward, Pass, Predicted, by_branch
from dit_svc.idle_experts import IdleExperts
from dit_svc.preview import PreviewFit, preview_picture
from services.config import EngineSection
from services.errors import InvalidRequest, NonFinite, OutOfMemory, ServiceError
from services.family import DenoiseState, DitModel, DitPart, Tensors
from services.features import Wrap, as_it_is
from services.parallel.mesh import Mesh
from services.request import Media, ResolvedParams
from services.tensors import Bundle


@dataclass(frozen=True, slots=True)
class DenoiseJob:
    """A request with its conditions, and the checkpoint it goes on from."""

    request_id: str
    params: ResolvedParams
    conditions: Tensors
    checkpoint: Bundle | None = None
    preview_fit: PreviewFit | None = None


@dataclass(frozen=True, slots=True)
class Stepped:
    """A request made a step; `sigma` is the noise level after it, `batch` the requests that made it together."""

    request_id: str
    step: int
    total: int
    sigma: float
    seconds: float
    batch: int


@dataclass(frozen=True, slots=True)
class Previewed:
    """A small picture of what the latents hold now."""

    request_id: str
    media: Media


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """A checkpoint; with `stopped` the engine has let the request go.

    `expert` takes the next step where that is the reason, as it is not here; else it was asked for. `busy_s` as of
    Finished.
    """

    request_id: str
    step: int
    tensors: Tensors
    attributes: dict[str, str]
    stopped: bool
    expert: str
    busy_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The final latents; `busy_s` counts preparation, the ticks that had the request in their batch, and the finish."""

    request_id: str
    tensors: Tensors
    busy_s: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The request cannot be finished."""

    request_id: str
    error: ServiceError


Event = Stepped | Previewed | Checkpointed | Finished | Failed


@dataclass(slots=True)
class Running:
    """A request in the engine."""

    state: DenoiseState
    preview_fit: PreviewFit | None
    arrival: int
    busy_s: float = 0.0
    checkpoint_wanted: bool = False
    stop_wanted: bool = False


@dataclass(slots=True)
class Flight:
    """A batch whose step is under way: it lands when `missing` predictions more have come."""

    batch: list[Running]
    missing: int
    started_s: float
    predicted: list[Predicted] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Landed:
    """Requests that have made their step, as soon as the device gets there; `finite` [requests] lies on the device."""

    here: list[Running]
    predictions: dict[str, torch.Tensor]
    finite: torch.Tensor
    started_s: float


@dataclass(slots=True)
class Counters:
    """For metrics."""

    steps: int = 0
    ticks: int = 0
    busy_s: float = 0.0
    aborted: int = 0
    extra: dict[str, float] = field(default_factory=dict)


class DitEngine:
    """Holds the running requests of one replica. Not thread-safe: one thread calls everything.

    Several ranks hold the same requests and call the same methods in the same order; so they decide alike.

    Args:
        wrap: what features put around the run of a block list.
        idle: keeps experts that are not wanted off the device.
    """

    def __init__(
        self,
        model: DitModel,
        part: DitPart,
        config: EngineSection,
        mesh: Mesh | None = None,
        wrap: Wrap = as_it_is,
        idle: IdleExperts | None = None,
    ) -> None:
        if config.branches not in ("rows", "serial", "auto"):
            raise InvalidRequest(f"engine.branches is {config.branches!r}: use rows, serial or auto")
        self._model = model
        self._part = part
        self._config = config
        self._forward = Forward(model, part, config.branches, mesh, wrap, idle)
        self._idle = idle
        self._single = mesh is None
        # A device of its own works on while the host says what came of the last step.
        self._asynchronous = model.device.type != "cpu"
        self._landed: list[Landed] = []
        self._flights: dict[str, Flight] = {}
        # Those whose turn is next come first.
        self._requests: dict[str, Running] = {}
        self._admitted = 0
        self._scheduler = StrideScheduler()
        self._events: deque[Event] = deque()
        self._counters = Counters()

    @property
    def busy(self) -> bool:
        """Whether a tick would do something."""
        return bool(self._requests) or bool(self._events) or not self._forward.empty

    @property
    def model(self) -> DitModel:
        """The transformers that this rank holds, or holds a share of."""
        return self._model

    def admit(self, job: DenoiseJob) -> None:
        """Takes a request in; it joins the batch at the next tick.

        Raises:
            InvalidRequest: conditions or checkpoint do not fit the model, or the id runs already.
        """
        if job.request_id in self._requests:
            raise InvalidRequest(f"request {job.request_id} runs here already")
        started_s = time.perf_counter()
        state = self._part.prepare(self._model, job.request_id, job.params, job.conditions)
        if job.checkpoint is not None:
            restore_state(self._model, state, job.checkpoint.tensors, job.checkpoint.attributes)
        self._admitted += 1
        running = Running(state, job.preview_fit, self._admitted, busy_s=time.perf_counter() - started_s)
        self._requests[job.request_id] = running
        if state.done:
            self._finish(running)

    def abort(self, request_id: str) -> None:
        """Lets a request go with everything it holds; unknown ids are ignored."""
        if self._requests.pop(request_id, None) is not None:
            self._counters.aborted += 1

    def request_checkpoint(self, request_id: str, *, stop: bool) -> None:
        """A Checkpointed event follows at the next tick; with `stop` the request leaves then."""
        running = self._requests.get(request_id)
        if running is not None:
            running.checkpoint_wanted = True
            running.stop_wanted = running.stop_wanted or stop

    def tick(self) -> list[Event]:
        """One step of one batch, and everything that came of it. With a pipeline, the step lands some ticks later."""
        events = self.begin()
        self.complete()
        return events + self._take_events()

    def begin(self) -> list[Event]:
        """The first half of a tick: what came of earlier ticks, for the caller to pass on while the device works.

        On a CPU, which cannot do both at once, the step itself waits for `complete`.
        """
        self._make_checkpoints()
        if self._asynchronous:
            self._launch()
        return self._take_events()

    def complete(self) -> None:
        """The second half: waits for the step."""
        if not self._asynchronous:
            self._launch()
        while self._landed:
            self._check(self._landed.pop(0))

    def _take_events(self) -> list[Event]:
        events = list(self._events)
        self._events.clear()
        return events

    def _launch(self) -> None:
        started_s = time.perf_counter()
        batch = self._scheduler.choose(
            list(self._requests.values()),
            self._key,
            self._cost,
            self._config.max_batch,
            under_way=lambda running: self._flights.get(running.state.request_id),
            # Behind a pipeline, several batches must be under way for all ranks to work.
            depth=self._forward.depth,
        )
        for running in batch:
            # Behind the others: more of one key than fit into a batch take turns. The device is full either way, and
            # one that holds a slot makes steps: its first preview, and a short request, need not wait for long ones.
            self._requests[running.state.request_id] = self._requests.pop(running.state.request_id)
        if batch:
            self._step(batch, started_s)
        elif not self._forward.empty:
            self._beat(None)

    def _key(self, running: Running) -> tuple[object, ...]:
        state = running.state
        part, model = self._part, self._model
        return (part.expert(model, state), len(part.branches(model, state)), *part.batch_key(model, state))

    def _cost(self, running: Running) -> float:
        branches = len(self._part.branches(self._model, running.state))
        return float(self._part.token_count(self._model, running.state.params) * branches)

    def _step(self, batch: list[Running], started_s: float) -> None:
        states = [running.state for running in batch]
        branches = self._part.branches(self._model, states[0])
        flight = Flight(batch, len(batch) * len(branches), started_s)
        for running in batch:
            self._flights[running.state.request_id] = flight
        try:
            for entering in self._forward.passes(states):
                self._beat(entering)
        except BaseException as error:
            for running in batch:
                self._flights.pop(running.state.request_id, None)
            # On one rank of several, the others are past this point: the group ends and starts anew.
            if not (self._single and isinstance(error, torch.OutOfMemoryError)):
                raise
            # The newest request of the batch goes; the others try again without it.
            self._out_of_memory(max(batch, key=lambda running: running.arrival))

    def _beat(self, entering: Pass | None) -> None:
        for one in self._forward.beat(entering):
            flight = self._flights[one.request_id]
            flight.predicted.append(one)
            flight.missing -= 1
            if not flight.missing:
                self._land(flight)

    def _land(self, flight: Flight) -> None:
        """The batch's predictions are complete: the scheduler's step, for requests that are still here."""
        for running in flight.batch:
            del self._flights[running.state.request_id]
        here = [running for running in flight.batch if self._holds(running)]
        if not here:
            return
        # First, because a lack of memory is nothing here, before any request has made its step.
        finite = torch.ones(len(here), dtype=torch.bool, device=self._model.device)
        outputs = by_branch(flight.predicted)
        predictions: dict[str, torch.Tensor] = {}
        for row, running in enumerate(here):
            with self._alone(running):
                state = running.state
                prediction = self._part.combine(self._model, state, outputs[state.request_id])
                self._part.advance(self._model, state, prediction)
                finite[row] = torch.isfinite(state.latents).all()
                predictions[state.request_id] = prediction
        self._landed.append(Landed(here, predictions, finite, flight.started_s))

    @contextlib.contextmanager
    def _alone(self, running: Running) -> Iterator[None]:
        """Running out of memory inside costs this request, and no other."""
        try:
            yield
        except torch.OutOfMemoryError:
            if not self._single:
                raise
            self._out_of_memory(running)

    def _check(self, landed: Landed) -> None:
        # The one moment of a step at which the host waits for the device.
        finite: list[bool] = landed.finite.tolist()
        seconds = time.perf_counter() - landed.started_s
        made = [(r, good) for r, good in zip(landed.here, finite, strict=True) if self._holds(r)]
        self._counters.ticks += 1
        self._counters.steps += len(made)
        self._counters.busy_s += seconds
        for running, good in made:
            running.busy_s += seconds
            with self._alone(running):
                self._report(running, good, seconds, len(made), landed.predictions[running.state.request_id])

    def _report(self, running: Running, good: bool, seconds: float, batch: int, prediction: torch.Tensor) -> None:
        state = running.state
        if not good:
            error = NonFinite(f"the latents became NaN or infinite in step {state.step} of {state.num_steps}")
            self._fail(running, error)
            return
        sigma = float(state.sigmas[state.step])
        self._events.append(Stepped(state.request_id, state.step, state.num_steps, sigma, seconds, batch))
        every = state.params.preview_every
        if every and running.preview_fit is not None and state.step % every == 0 and not state.done:
            latents = self._part.preview_latents(self._model, state, prediction)
            self._events.append(Previewed(state.request_id, preview_picture(latents, running.preview_fit)))
        if state.done:
            self._finish(running)

    def _make_checkpoints(self) -> None:
        for running in list(self._requests.values()):
            state, elsewhere = running.state, self._elsewhere(running.state)
            if not (running.checkpoint_wanted or elsewhere):
                continue
            tensors, attributes = save_state(state)
            tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
            stops = running.stop_wanted or bool(elsewhere)
            self._events.append(
                Checkpointed(state.request_id, state.step, tensors, attributes, stops, elsewhere, running.busy_s)
            )
            running.checkpoint_wanted = False
            if stops:
                del self._requests[state.request_id]

    def _elsewhere(self, state: DenoiseState) -> str:
        """The expert of the next step, if another replica holds it."""
        expert = self._part.expert(self._model, state)
        return "" if expert in self._model.modules else expert

    def _finish(self, running: Running) -> None:
        started_s = time.perf_counter()
        # To the host at once: later, the copy would wait behind the next step of the others.
        tensors = {name: tensor.cpu() for name, tensor in self._part.finish(self._model, running.state).items()}
        del self._requests[running.state.request_id]
        running.busy_s += time.perf_counter() - started_s
        self._events.append(Finished(running.state.request_id, tensors, running.busy_s))

    def _fail(self, running: Running, error: ServiceError) -> None:
        del self._requests[running.state.request_id]
        self._events.append(Failed(running.state.request_id, error))

    def _out_of_memory(self, running: Running) -> None:
        torch.cuda.empty_cache()
        self._fail(running, OutOfMemory("the device ran out of memory in a step: ask for a smaller size"))

    def _holds(self, running: Running) -> bool:
        return self._requests.get(running.state.request_id) is running

    def warm_up(self, params: ResolvedParams, conditions: Tensors) -> None:
        """Runs batches of one row and of several, so that everything is compiled and allocated before service.

        Args:
            params: with steps of every expert that is held, of which two are made.
            conditions: random ones, for every branch.
        """
        for count in (1, 2, min(3, self._config.max_batch)):
            for index in range(count):
                self.admit(DenoiseJob(f"warm-up-{index}", params, conditions))
            for running in self._requests.values():
                running.state.step = self._late(running.state)
            while self._requests:
                self.tick()
            self._events.clear()
        self._counters = Counters()

    def _late(self, state: DenoiseState) -> int:
        """The last step but one that is made here; the first one where none is."""
        here = [step for step in range(state.num_steps) if not self._elsewhere(replace(state, step=step))]
        return here[-2:][0] if here else 0

    def metrics(self) -> dict[str, float]:
        """Plain figures. `dit_live_tensors` returns to 0 when no request runs."""
        counters = self._counters
        return {
            "dit_requests": len(self._requests),
            "dit_live_tensors": sum(_tensor_count(running.state) for running in self._requests.values()),
            "dit_steps_total": counters.steps,
            "dit_rows_total": self._forward.rows,
            "dit_ticks_total": counters.ticks,
            "dit_busy_seconds_total": round(counters.busy_s, 6),
            "dit_aborted_total": counters.aborted,
        } | ({} if self._idle is None else {"dit_expert_swaps_total": self._idle.swaps})


def _tensor_count(state: DenoiseState) -> int:
    groups = [*state.conditioning.values(), state.shared, *state.caches.values()]
    return 1 + sum(len(group) for group in groups)
