"""One replica of a stage as a gateway sees it: what it said of itself, and what it has of this gateway's requests."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc

from gateway.pace import Pace, units
from gateway.ticket import Offer
from protos import gateway_pb2, types_pb2
from services.errors import NotReady, Overloaded, ServiceError

BACK_OFF_S = 0.25
MAX_BACK_OFF_S = 4.0
STAGES = {
    "text_encoder": types_pb2.STAGE_TEXT_ENCODER,
    "dit": types_pb2.STAGE_DIT,
    "vae": types_pb2.STAGE_VAE,
    "interpolation": types_pb2.STAGE_INTERPOLATION,
}


class Place(NamedTuple):
    """What serves a model in a stage; `expert` where its denoisers hold one each."""

    stage: str
    model: str
    expert: str = ""


@dataclass(slots=True)
class Replica:
    """One address of a stage. `facts` is its last Describe, None while it does not answer.

    `batches` has the batch key of each of our requests there; `others` is how many it has from other gateways, as far
    as we know.
    """

    stage: str
    address: str
    channel: grpc.aio.Channel
    facts: types_pb2.DescribeResponse | None = None
    batches: list[str] = field(default_factory=list)
    others: int = 0
    silent_because: str = ""
    paused_until_s: float = 0.0
    pace: Pace = field(default_factory=Pace)
    _back_off_s: float = BACK_OFF_S

    @property
    def ours(self) -> int:
        """Requests that it has from this gateway."""
        return len(self.batches)

    @property
    def healthy(self) -> bool:
        """Whether it can take requests at all."""
        return self.facts is not None and not self.facts.draining

    @property
    def available(self) -> bool:
        """Whether it may take one more, as far as this gateway knows of its own requests."""
        return (
            self.facts is not None
            and self.healthy
            and self.ours < self.facts.max_in_flight
            and time.monotonic() >= self.paused_until_s
        )

    @property
    def has_credit(self) -> bool:
        """Whether it may take one more beside those of other gateways."""
        return self.facts is not None and self.available and self.ours + self.others < self.facts.max_in_flight

    def offer(self, feeds: Collection[str] | None = None) -> Offer:
        """For a claim of what needs one of these feeds. Redis knows what all gateways have claimed for it."""
        if self.facts is None:
            return Offer()
        max_cost = self.facts.max_cost or math.inf
        return Offer(self.facts.replica_id, self.facts.max_in_flight, max_cost, set(self.batches), feeds)

    def serves(self, model: str) -> bool:
        """Whether it takes that model's requests; one that names no model takes those of any."""
        return self.facts is not None and (model in self.facts.models or not self.facts.models)

    @contextlib.contextmanager
    def in_use(self, batch: str = "") -> Iterator[None]:
        """Counts one request of ours."""
        self.batches.append(batch)
        try:
            yield
        finally:
            self.batches.remove(batch)

    def call(self, kind: str, method: str, *request: object, **options: object) -> Any:
        """A call that has begun, whose messages are bytes.

        Args:
            kind: unary_stream or stream_stream.

        Raises:
            NotReady: its channel has been closed since the replica was chosen, as it is on no list any more.
        """
        try:
            return getattr(self.channel, kind)(method)(*request, **options)
        except grpc.aio.UsageError as error:
            raise NotReady(f"the replica left before it was called: {error}") from error

    def told(self, facts: types_pb2.DescribeResponse, ours_before: int) -> None:
        """Takes an answer to Describe.

        Args:
            ours_before: `ours` when it was asked. What has come or gone since may be in the answer or not.
        """
        self.facts = facts
        self.others = max(0, facts.in_flight - max(ours_before, self.ours))

    def refused(self, error: ServiceError) -> None:
        """A call failed with an error that may pass."""
        if isinstance(error, Overloaded) and self.facts is not None:
            self.others = max(0, self.facts.max_in_flight - self.ours)
        self.pause()

    def took(self, usage: types_pb2.StageUsage, params: types_pb2.GenerationParams) -> None:
        """Learns from a call that ends now, and is still counted."""
        elapsed_s = sum(span.duration_ns for span in usage.spans) / 1e9
        # Others may have requests here too; what it says of itself is a moment old.
        in_flight = max(self.ours, self.facts.in_flight if self.facts is not None else 0)
        self.pace.learn(elapsed_s, in_flight, units(self.stage, params))

    def pause(self) -> None:
        """Leaves it alone for a moment, twice as long as before when that was not long ago."""
        now_s = time.monotonic()
        if now_s < self.paused_until_s:
            return
        again = now_s < self.paused_until_s + MAX_BACK_OFF_S
        self._back_off_s = min(2 * self._back_off_s, MAX_BACK_OFF_S) if again else BACK_OFF_S
        self.paused_until_s = now_s + self._back_off_s


def replica_proto(replica: Replica, facts: types_pb2.DescribeResponse) -> gateway_pb2.Replica:
    """What clients are told of it."""
    return gateway_pb2.Replica(
        address=replica.address,
        stage=STAGES[replica.stage],
        replica_id=facts.replica_id,
        component_id=facts.component_id,
        in_flight=facts.in_flight,
        max_in_flight=facts.max_in_flight,
        healthy=replica.healthy,
        expert=facts.expert,
        world_size=facts.world_size,
        layout=facts.layout,
    )
