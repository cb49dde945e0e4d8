"""The denoise loop: the only one there is.

A tick takes one batch of requests one step further: collate, embed, blocks, head for the guidance branches, combine,
scheduler step. Requests join and leave between ticks, so abort and checkpoint cost one step at most. The engine knows
families through their functions and features not at all: they have acted on the block list before it starts.
"""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from dit_svc.batching import StrideScheduler
from dit_svc.checkpoint import restore_state, save_state
from services.config import EngineSection
from services.errors import InvalidRequest, NonFinite, OutOfMemory, ServiceError
from services.family import Block, DenoiseState, DitModel, DitPart, Row, Tensors
from services.request import Media, ResolvedParams
from services.tensors import Bundle

# Below this many tokens a row, a forward is bound by overheads, and branches gain from sharing it.
ROWS_BELOW_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class PreviewFit:
    """Linear latent-to-RGB fit: rgb = latent @ weight + bias, in [0, 1]. weight [C, 3], bias [3]."""

    weight: torch.Tensor
    bias: torch.Tensor


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
    """A checkpoint that was asked for; with `stopped` the engine has let the request go."""

    request_id: str
    step: int
    tensors: Tensors
    attributes: dict[str, str]
    stopped: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """The final latents; `busy_s` counts the ticks that had the request in their batch."""

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
    busy_s: float = 0.0
    checkpoint_wanted: bool = False
    stop_wanted: bool = False


@dataclass(slots=True)
class Counters:
    """For metrics."""

    steps: int = 0
    rows: int = 0
    ticks: int = 0
    busy_s: float = 0.0
    aborted: int = 0
    extra: dict[str, float] = field(default_factory=dict)


class DitEngine:
    """Holds the running requests of one replica. Not thread-safe: one thread calls everything."""

    def __init__(self, model: DitModel, part: DitPart, config: EngineSection) -> None:
        if config.branches not in ("rows", "serial", "auto"):
            raise InvalidRequest(f"engine.branches is {config.branches!r}: use rows, serial or auto")
        self._model = model
        self._part = part
        self._config = config
        self._blocks: dict[str, Sequence[Block]] = {name: part.blocks(module) for name, module in model.modules.items()}
        self._requests: dict[str, Running] = {}
        self._scheduler = StrideScheduler()
        self._events: deque[Event] = deque()
        self._counters = Counters()

    @property
    def busy(self) -> bool:
        """Whether a tick would do something."""
        return bool(self._requests) or bool(self._events)

    def admit(self, job: DenoiseJob) -> None:
        """Takes a request in; it joins the batch at the next tick.

        Raises:
            InvalidRequest: conditions or checkpoint do not fit the model, or the id runs already.
        """
        if job.request_id in self._requests:
            raise InvalidRequest(f"request {job.request_id} runs here already")
        state = self._part.prepare(self._model, job.request_id, job.params, job.conditions)
        if job.checkpoint is not None:
            restore_state(self._model, state, job.checkpoint.tensors, job.checkpoint.attributes)
        running = Running(state, job.preview_fit)
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
        """One step of one batch, and everything that came of it."""
        self._make_checkpoints()
        batch = self._scheduler.choose(
            list(self._requests.values()), self._key, self._cost, max(1, self._config.max_batch)
        )
        if batch:
            self._step(batch)
        events = list(self._events)
        self._events.clear()
        return events

    def _key(self, running: Running) -> tuple[object, ...]:
        state = running.state
        part, model = self._part, self._model
        return (part.expert(model, state), len(part.branches(model, state)), *part.batch_key(model, state))

    def _cost(self, running: Running) -> float:
        branches = len(self._part.branches(self._model, running.state))
        return float(self._part.token_count(self._model, running.state.params) * branches)

    def _step(self, batch: list[Running]) -> None:
        started_s = time.perf_counter()
        try:
            predictions = self._forward([running.state for running in batch])
            finite = self._advance(batch, predictions)
        except torch.OutOfMemoryError:
            self._out_of_memory(batch)
            return
        seconds = time.perf_counter() - started_s
        self._counters.ticks += 1
        self._counters.steps += len(batch)
        self._counters.busy_s += seconds
        for running, good in zip(batch, finite, strict=True):
            running.busy_s += seconds
            self._report(running, good, seconds, len(batch), predictions[running.state.request_id])

    def _forward(self, states: list[DenoiseState]) -> dict[str, torch.Tensor]:
        """Guided predictions by request id."""
        part, model = self._part, self._model
        expert = part.expert(model, states[0])
        branches = part.branches(model, states[0])
        by_branch: dict[str, dict[str, torch.Tensor]] = {state.request_id: {} for state in states}
        for rows in self._row_groups(states, branches):
            outputs = self._run_blocks(expert, rows)
            for row, output in zip(rows, torch.split(outputs, 1), strict=True):
                by_branch[row.state.request_id][row.branch] = output
            self._counters.rows += len(rows)
        return {state.request_id: part.combine(model, state, by_branch[state.request_id]) for state in states}

    def _row_groups(self, states: list[DenoiseState], branches: tuple[str, ...]) -> list[list[Row]]:
        mode = self._config.branches
        if mode == "auto":
            tokens = self._part.token_count(self._model, states[0].params)
            mode = "rows" if tokens < ROWS_BELOW_TOKENS else "serial"
        if mode == "serial":
            return [[Row(state, branch) for state in states] for branch in branches]
        return [[Row(state, branch) for state in states for branch in branches]]

    def _run_blocks(self, expert: str, rows: list[Row]) -> torch.Tensor:
        module = self._model.modules[expert]
        streams = self._part.embed(module, self._part.collate(self._model, rows))
        for block in self._blocks[expert]:
            streams = block.run(streams)
        return self._part.head(module, streams)

    def _advance(self, batch: list[Running], predictions: dict[str, torch.Tensor]) -> list[bool]:
        checks = []
        for running in batch:
            state = running.state
            self._part.advance(self._model, state, predictions[state.request_id])
            checks.append(torch.isfinite(state.latents).all())
        # The one moment of a step at which the host waits for the device.
        return [bool(good) for good in torch.stack(checks).tolist()]

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
            if not running.checkpoint_wanted:
                continue
            tensors, attributes = save_state(running.state)
            request_id = running.state.request_id
            self._events.append(Checkpointed(request_id, running.state.step, tensors, attributes, running.stop_wanted))
            running.checkpoint_wanted = False
            if running.stop_wanted:
                del self._requests[request_id]

    def _finish(self, running: Running) -> None:
        del self._requests[running.state.request_id]
        tensors = self._part.finish(self._model, running.state)
        self._events.append(Finished(running.state.request_id, tensors, running.busy_s))

    def _fail(self, running: Running, error: ServiceError) -> None:
        del self._requests[running.state.request_id]
        self._events.append(Failed(running.state.request_id, error))

    def _out_of_memory(self, batch: list[Running]) -> None:
        """The newest request of the batch goes; the others try again without it."""
        torch.cuda.empty_cache()
        self._fail(batch[-1], OutOfMemory("the device ran out of memory in a step: ask for a smaller size"))

    def warm_up(self, params: ResolvedParams, conditions: Tensors) -> None:
        """Runs batches of one row and of several, so that everything is compiled and allocated before service.

        Args:
            conditions: random ones, for every branch.
        """
        for count in (1, 2, min(3, self._config.max_batch)):
            for index in range(count):
                self.admit(DenoiseJob(f"warm-up-{index}", params, conditions))
            while self._requests:
                self.tick()
            self._events.clear()
        self._counters = Counters()

    def metrics(self) -> dict[str, float]:
        """Plain figures. `dit_live_tensors` returns to 0 when no request runs."""
        counters = self._counters
        return {
            "dit_requests": len(self._requests),
            "dit_live_tensors": sum(_tensor_count(running.state) for running in self._requests.values()),
            "dit_steps_total": counters.steps,
            "dit_rows_total": counters.rows,
            "dit_ticks_total": counters.ticks,
            "dit_busy_seconds_total": round(counters.busy_s, 6),
            "dit_aborted_total": counters.aborted,
        }


def preview_picture(latents: torch.Tensor, fit: PreviewFit) -> Media:
    """The middle frame of latents [F, C, H, W] through the fit, as JPEG: one pixel a latent."""
    frame = latents[latents.shape[0] // 2].float().permute(1, 2, 0)
    rgb = (frame @ fit.weight.to(frame.device) + fit.bias.to(frame.device)).clamp(0, 1)
    pixels: np.ndarray = (rgb * 255).round().to(torch.uint8).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).resize((4 * pixels.shape[1], 4 * pixels.shape[0])).save(file, "JPEG", quality=80)
    return Media("image/jpeg", file.getvalue(), "preview")


def _tensor_count(state: DenoiseState) -> int:
    groups = [*state.conditioning.values(), state.shared, *state.caches.values()]
    return 1 + sum(len(group) for group in groups)
