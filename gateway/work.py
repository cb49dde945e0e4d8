"""A claimed request in work: what its stage calls are made of, what they reported, and how far it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gateway.records import Claim
from gateway.state import State
from gateway.store import artifact_name
from protos import dit_pb2, gateway_pb2, types_pb2
from services.errors import ServiceError
from services.telemetry import new_traceparent

EVENT_PERIOD_S = 0.2
EVENTS_A_SECOND = 5


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint in the store: its file among the latents, and what its bytes must hash to."""

    name: str
    step: int
    sha256: str


def kept_in(record: Mapping[str, bytes]) -> list[Kept]:
    """The checkpoints that a request's record names, newest first."""
    text = record.get("checkpoints", b"")
    return [Kept(**fields) for fields in json.loads(text)] if text else []


def busy_in(record: Mapping[str, bytes]) -> dict[str, float]:
    """Seconds by stage, as a request's record has them."""
    return {key.removeprefix("busy:"): float(value) for key, value in record.items() if key.startswith("busy:")}


def spans_in(record: Mapping[str, bytes]) -> list[types_pb2.Span]:
    """A request's timeline, as its record has it."""
    noted = (gateway_pb2.TraceResponse.FromString(v) for key, v in record.items() if key.startswith("spans:"))
    return [span for part in noted for span in part.spans]


@dataclass(slots=True)
class Work:
    """A claim in work, with what its stages reported, before this claim too. `deadline_s` is on this process's
    monotonic clock.
    """

    claim: Claim
    params: types_pb2.GenerationParams
    deadline_s: float
    traceparent: str
    checkpoints: list[Kept] = field(default_factory=list)
    busy_s: dict[str, float] = field(default_factory=dict)
    spans: list[types_pb2.Span] = field(default_factory=list)

    @classmethod
    def of(cls, claim: Claim) -> Work:
        """From the stored record."""
        record = claim.record
        # The claim is its last update: what was left then, by the clock of Redis, is left now.
        left_s = float(record["deadline"]) - float(record["updated"])
        return cls(
            claim=claim,
            params=types_pb2.GenerationParams.FromString(record["params"]),
            deadline_s=time.monotonic() + left_s,
            traceparent=record["traceparent"].decode(),
            checkpoints=kept_in(record),
            busy_s=busy_in(record),
            spans=spans_in(record),
        )

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.claim.request_id

    @property
    def batch(self) -> str:
        """The batch key."""
        return self.claim.record.get("batch", b"").decode()

    @property
    def artifact_name(self) -> str:
        """The file that the result goes to."""
        return artifact_name(self.request_id, self.claim.fence)

    def take_inputs(self, inputs: bytes | None) -> None:
        """Puts the pictures into the parameters; a record has only their kinds. None: the request has ended."""
        if inputs is not None:
            del self.params.inputs[:]
            self.params.MergeFromString(inputs)

    def context(self) -> types_pb2.RequestContext:
        """For a stage's first message."""
        attempt = int(self.claim.record.get("attempt", b"1"))
        alone = "alone" in self.claim.record
        return types_pb2.RequestContext(
            request_id=self.request_id, fence=self.claim.fence, attempt=attempt, alone=alone
        )

    def call_options(self) -> dict[str, Any]:
        """Deadline and trace context of a stage call."""
        return {
            "timeout": max(0.001, self.deadline_s - time.monotonic()),
            "metadata": (("traceparent", new_traceparent(self.traceparent)),),
        }

    def add(self, stage: str, usage: types_pb2.StageUsage) -> None:
        """Takes a stage's usage."""
        self.busy_s[stage] = self.busy_s.get(stage, 0.0) + usage.busy_s
        self.spans.extend(usage.spans)

    def fields(self, **more: str | bytes) -> dict[str, str | bytes | float]:
        """Hash fields of a commit."""
        spans = gateway_pb2.TraceResponse(spans=self.spans).SerializeToString()
        name = "spans:" + (sorted(self.busy_s)[0] if self.busy_s else "none")
        return {f"busy:{stage}": seconds for stage, seconds in self.busy_s.items()} | {name: spans} | more


class _Event(NamedTuple):
    kind: str
    payload: bytes
    step: int
    total: int


class Progress:
    """Step events, previews and counts of frames, no more than five in any second; what still waits at the end goes out
    at once.

    Progress is not worth a stall of the stream: one task tells Redis beside it. Of each kind only the newest waits.
    """

    def __init__(self, state: State, claim: Claim, lease_s: float) -> None:
        self._state = state
        self._claim = claim
        self._lease_s = lease_s
        self._sent_s = 0.0
        self._waiting: dict[str, _Event] = {}
        self._told_s: deque[float] = deque(maxlen=EVENTS_A_SECOND)
        self._closing = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None

    def step(self, event: dit_pb2.StepEvent) -> None:
        """Notes a step."""
        if event.step not in (1, event.total) and not self._is_time():
            return
        self._sent_s = time.monotonic()
        progress = gateway_pb2.StepProgress(
            step=event.step, total=event.total, sigma=event.sigma, seconds=event.seconds
        )
        self._send(_Event("step", progress.SerializeToString(), event.step, event.total))

    def frames(self, made: int) -> None:
        """Notes how many frames of a clip are made."""
        if self._is_time():
            self._sent_s = time.monotonic()
            self._send(_Event("frames", b"", made, 0))

    def _is_time(self) -> bool:
        return time.monotonic() - self._sent_s >= EVENT_PERIOD_S

    def preview(self, media: types_pb2.Media) -> None:
        """Passes a preview on."""
        self._send(_Event("preview", media.SerializeToString(), 0, 0))

    def _send(self, event: _Event) -> None:
        # It takes its predecessor's place in the line: neither kind holds up the other for ever.
        self._waiting[event.kind] = event
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send_waiting())

    async def _send_waiting(self) -> None:
        while self._waiting:
            await self._pause()
            event = self._waiting.pop(next(iter(self._waiting)))
            self._told_s.append(time.monotonic())
            try:
                await self._state.beat(self._claim, self._lease_s, **event._asdict())
            except ServiceError:
                # What waited meanwhile is old, and whoever closes must not wait for one try after the other.
                self._waiting.clear()

    async def _pause(self) -> None:
        """Until a second has passed since the fifth event before the next one, or the end."""
        if len(self._told_s) < EVENTS_A_SECOND:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._told_s[0] + 1 - time.monotonic()):
                await self._closing.wait()

    async def close(self) -> None:
        """Waits for what is under way, and sends what waits."""
        self._closing.set()
        if self._sender is not None:
            await self._sender
