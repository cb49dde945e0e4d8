"""Engines alone at full size, in one process, for what the benchmarks of the cluster do not ask."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit_svc.engine import Checkpointed, DenoiseJob, DitEngine, Failed, Finished, Stepped
from services.config import EngineSection, ModelSection, ServiceSection, StageConfig
from services.family import Tensors

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Denoised:
    """What an engine made of a request, alone: `step_s` seconds of each step, `peak_gib` of the device's memory, the
    weights included. `handed` is what it ended with where another expert goes on.
    """

    step_s: list[float]
    peak_gib: float
    latents: torch.Tensor | None = None
    handed: Checkpointed | None = None

    def figures(self) -> dict[str, Any]:
        """In plain numbers. The first step is the slowest: memory and kernels are found for the shape."""
        facts = asdict(self)
        return {
            "step_s": statistics.median(self.step_s[1:] or self.step_s),
            "steps_s": [round(seconds, 4) for seconds in self.step_s],
            "peak_gib": round(self.peak_gib, 2),
            "shape": None if self.latents is None else list(facts["latents"].shape),
        }


def config_of(source: str, family: str, preset: str, device: str, **engine: Any) -> StageConfig:
    """Of a stage: compiled blocks and the best attention on a GPU; `family` and `preset` are for random weights."""
    random = source.startswith("random:")
    model = ModelSection(
        name="m", source=source, device=device, family=family if random else "", preset=preset if random else ""
    )
    features: dict[str, dict[str, Any]] = {"attention": {}, "compile": {}} if device != "cpu" else {}
    return StageConfig(service=ServiceSection(port=0), model=model, engine=EngineSection(**engine), features=features)


def denoise(engine: DitEngine, job: DenoiseJob) -> Denoised:
    """Takes a request to its end in this engine.

    Raises:
        ServiceError: what it failed with.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    engine.admit(job)
    step_s: list[float] = []
    latents: Tensors = {}
    handed: Checkpointed | None = None
    while engine.busy:
        for event in engine.tick():
            match event:
                case Stepped():
                    step_s.append(event.seconds)
                case Finished():
                    latents = event.tensors
                case Checkpointed():
                    handed = event
                case Failed():
                    raise event.error
    peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
    made = latents.get("latents")
    if made is not None and not bool(torch.isfinite(made).all()):
        raise RuntimeError("the latents are not finite")
    return Denoised(step_s, peak, made, handed)
