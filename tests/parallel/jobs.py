"""What the ranks of the pool run: the denoiser over a mesh, as its rank processes run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor

from dit_svc.engine import Checkpointed, DenoiseJob, Event, Finished
from dit_svc.loading import open_engine
from services.config import EngineSection, ModelSection, ParallelSection, ServiceSection, StageConfig
from services.family import Tensors
from services.parallel.collectives import sent_bytes
from services.parallel.degrees import Degrees
from services.parallel.mesh import Mesh
from services.tensors import Bundle


@dataclass(frozen=True)
class Script:
    """What happens on the ranks.

    Attributes:
        jobs: one is admitted every tick.
        abort: job to abort after that many ticks, by id.
        checkpoint: job that is stopped with a checkpoint after that many ticks, by id.
    """

    jobs: Sequence[DenoiseJob]
    abort: dict[str, int] = field(default_factory=dict)
    checkpoint: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What came of it on one rank."""

    finished: dict[str, Tensors]
    checkpoints: dict[str, Bundle]
    sent: dict[str, int]
    weight_bytes: int
    live_tensors: float
    ticks: int


def denoise(rank: int, world: int, folder: str, parallel: dict[str, int], engine: dict, script: Script) -> Report:
    """Loads the folder's denoiser as the degrees say, runs the script to its end."""
    section = ParallelSection(**parallel)
    mesh = Mesh(Degrees.of(section), rank, "cpu")
    assert mesh.degrees.world == world
    config = StageConfig(
        service=ServiceSection(port=0),
        model=ModelSection(name="m", source=folder, device="cpu", dtype="float32"),
        parallel=section,
        engine=EngineSection(warmup=False, **engine),
    )
    dit, _ = open_engine(config, mesh)
    sent_bytes.clear()
    events: list[Event] = []
    waiting, ticks = list(script.jobs), 0
    while waiting or dit.busy:
        if waiting:
            dit.admit(waiting.pop(0))
        for request_id, moment in script.abort.items():
            if moment == ticks:
                dit.abort(request_id)
        for request_id, moment in script.checkpoint.items():
            if moment == ticks:
                dit.request_checkpoint(request_id, stop=True)
        events += dit.tick()
        ticks += 1
    return Report(
        finished={event.request_id: event.tensors for event in events if isinstance(event, Finished)},
        checkpoints={
            event.request_id: Bundle(dict(event.tensors), event.attributes)
            for event in events
            if isinstance(event, Checkpointed)
        },
        sent=dict(sent_bytes),
        weight_bytes=sum(
            held(weight).nbytes for module in dit.model.modules.values() for weight in module.parameters()
        ),
        live_tensors=dit.metrics()["dit_live_tensors"],
        ticks=ticks,
    )


def denoise_in_each(
    rank: int, world: int, folder: str, layouts: Sequence[dict[str, int]], engine: dict, script: Script
) -> list[Report]:
    """The same script in one layout after the other."""
    return [denoise(rank, world, folder, parallel, engine, script) for parallel in layouts]


def held(weight: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that is on this rank between two forwards."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
