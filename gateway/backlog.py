"""What waits for each stage, in requests and in seconds of one replica's work: what an autoscaler needs to know.

All gateways say the same, because the queues are in Redis: take the maximum over them, never the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.records import Queued, queue_key
from gateway.replica import Place
from gateway.replicas import Replicas
from gateway.state import State
from services.errors import StateStoreDown

LABELS = ("stage", "model", "expert", "component")


@dataclass(frozen=True, slots=True)
class Row:
    """A stage of a model now, or one expert of it: `expert` is "" where a denoiser holds all.

    `queued` is None while Redis does not answer, `unit_s` while nobody has worked yet.
    """

    stage: str
    model: str
    expert: str
    component: str
    replicas: int
    running: int
    queued: Queued | None
    unit_s: float | None

    @property
    def labels(self) -> tuple[str, ...]:
        """Values of LABELS."""
        return self.stage, self.model, self.expert, self.component

    @property
    def queued_s(self) -> float | None:
        """Seconds of one replica's work that wait; None while they cannot be known."""
        if self.queued is None:
            return None
        if not self.queued.requests:
            return 0.0
        return None if self.unit_s is None else self.unit_s * self.queued.units(self.stage)


class Backlog:
    """Reads the queues when it is asked."""

    def __init__(self, state: State, replicas: Replicas) -> None:
        self._state = state
        self._replicas = replicas

    async def exposition(self) -> bytes:
        """The rows as Prometheus text. What cannot be known now is left out: it must not look like an empty queue."""
        registry = CollectorRegistry()
        registry.register(_Families(await self.rows()))
        return generate_latest(registry)

    async def rows(self) -> list[Row]:
        """A row for every place of every model that has had a replica since this gateway started."""
        components = self._replicas.components()
        keys = {place: self._queue(place, component) for place, component in components.items()}
        learnt = {f"{stage}:{component}": pace for (stage, component), pace in self._replicas.paces().items()}
        queues = sorted({key for key in keys.values() if key})
        try:
            paces, found = await self._state.backlog(queues, learnt)
        except StateStoreDown:
            paces, found = learnt, {}
        rows, decoded = [], {key for place, key in keys.items() if place.stage == "vae"}
        for place, component in components.items():
            stage, model, expert = place
            here = [
                replica
                for replica in self._replicas.of_stage(stage)
                if replica.facts is not None and replica.serves(model) and replica.facts.expert == expert
            ]
            running = sum(replica.facts.in_flight for replica in here if replica.facts is not None)
            unit_s = paces.get(f"{stage}:{component}")
            if stage == "interpolation":
                queued = _interpolated([found[key] for key in queues if key in found and key in decoded])
            else:
                queued = found.get(keys[place])
            rows.append(Row(stage, model, expert, component, len(here), running, queued, unit_s))
        return rows

    def _queue(self, place: Place, component: str) -> str:
        """Where requests wait that need the stage: those that wait for a denoiser need a text encoder as well.

        None wait for an interpolator alone: it takes the frames of a clip while they are decoded.
        """
        if place.stage == "interpolation":
            return ""
        if place.stage != "text_encoder":
            return queue_key(place.stage, component)
        # A second expert finds its texts in the encoder's cache.
        denoiser = self._replicas.last_facts("dit", place.model)
        return queue_key("dit", denoiser.component_id) if denoiser is not None else ""


def _interpolated(decoded: list[Queued]) -> Queued | None:
    """What waits for an interpolator, of what waits to be decoded; None while that is not known."""
    if not decoded:
        return None
    return Queued(
        sum(queue.interpolated for queue in decoded), sum(queue.interpolated_pixels for queue in decoded), 0.0
    )


class _Families(Collector):
    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def collect(self) -> Iterator[Metric]:
        yield from families(self._rows)


def families(rows: list[Row]) -> Iterator[GaugeMetricFamily]:
    """The rows as Prometheus has them."""
    replicas = GaugeMetricFamily("lightloom_replicas", "Replicas that take requests", labels=LABELS)
    running = GaugeMetricFamily("lightloom_running_requests", "Requests in the stage's replicas", labels=LABELS)
    queued = GaugeMetricFamily("lightloom_queued_requests", "Requests that wait and need the stage", labels=LABELS)
    seconds = GaugeMetricFamily(
        "lightloom_queued_seconds", "Seconds of one replica's work that wait for the stage", labels=LABELS
    )
    for row in rows:
        replicas.add_metric(row.labels, row.replicas)
        running.add_metric(row.labels, row.running)
        if row.queued is not None:
            queued.add_metric(row.labels, row.queued.requests)
        if row.queued_s is not None:
            seconds.add_metric(row.labels, row.queued_s)
    yield from (replicas, running, queued, seconds)
