"""Our parts and the stock pipeline on the same tiny weights: what every row of the oracle's table is compared with.

A row names a family and a variant, says what to ask of it, and how its stock pipeline is loaded. The rest is the same
for every model: conditions come from the services' own text and VAE engines, latents from the service's own denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dit_svc.engine import DenoiseJob, DitEngine, Event, Finished
from services.config import EngineSection
from services.families import load_family
from services.family import Tensors, TextInput, TextPart
from services.request import GenerationParams, ResolvedParams, resolve
from services.tensors import Bundle
from services.weights import open_source
from text_encoder_svc.engine import TextEngine
from vae_svc.engine import VaeEngine, VaeJob, encode_alone

CPU = torch.device("cpu")

Stock = Callable[[ResolvedParams], Tensors]


@dataclass(frozen=True, slots=True)
class OracleRow:
    """One family and variant.

    Attributes:
        wishes: three generations with different steps, prompt lengths, sizes and seeds; guidance is on.
        load_stock: from the tiny model's folder and a dtype to a function that runs the stock pipeline and gives the
            final latents as `DitPart.finish` lays them out.
        together: three that may share a forward at any steps; left out, the wishes in the shape of the first.
        shared: how many of them meet in one forward when each is admitted a step after the one before.
        bf16_tolerance: max|a - b| / max|b| against the stock pipeline in bf16; 0 means equal bit for bit.
        name: where a variant has several rows.
    """

    family: str
    variant: str
    wishes: tuple[GenerationParams, GenerationParams, GenerationParams]
    load_stock: Callable[[Path, torch.dtype], Stock]
    together: tuple[GenerationParams, ...] = ()
    shared: int = 3
    bf16_tolerance: float = 0.0
    name: str = ""

    def __str__(self) -> str:
        return self.name or f"{self.family}-{self.variant}"

    @property
    def batch(self) -> tuple[GenerationParams, ...]:
        """Wishes of one shape."""
        first = self.wishes[0]
        return self.together or tuple(
            replace(wish, width=first.width, height=first.height, num_frames=first.num_frames, inputs=first.inputs)
            for wish in self.wishes
        )


class Subject:
    """The family's parts and engines, and the stock pipeline, on one folder in one dtype."""

    def __init__(self, row: OracleRow, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.family = load_family(row.family)
        self.limits = self.family.variants[row.variant].limits
        source = open_source(str(folder))
        # One text at a time, as the stock pipelines encode: padding beside a longer one costs the last bits.
        text = replace(self.family.text, encode=_one_by_one(self.family.text))
        self.text = TextEngine(text, text.load(source, CPU, dtype), max_batch=1, cache_bytes=0)
        self.dit = self.family.dit.load(source, CPU, dtype)
        self.vae = VaeEngine(self.family.vae, self.family.vae.load(source, CPU, dtype), max_batch=1)
        self._stock = row.load_stock(folder, dtype)
        self._known: dict[ResolvedParams, Tensors] = {}

    def params(self, wish: GenerationParams) -> ResolvedParams:
        """The wish within the variant's limits."""
        return resolve(wish, self.limits, seed=0)

    def job(self, name: str, params: ResolvedParams, checkpoint: Bundle | None = None) -> DenoiseJob:
        """The request as the denoiser gets it: embeddings, and latents of input pictures."""
        self.text.submit(name, params)
        [encoded] = self.text.tick()
        if encoded.error is not None:
            raise encoded.error
        conditions = dict(encoded.tensors)
        if params.inputs:
            conditions |= encode_alone(self.vae, VaeJob(name, params))
        return DenoiseJob(name, params, conditions, checkpoint)

    def engine(self, **options) -> DitEngine:
        """A denoiser of its own, on the shared weights."""
        return DitEngine(self.dit, self.family.dit, EngineSection(**options))

    def stock(self, params: ResolvedParams) -> Tensors:
        """What the stock pipeline makes of the same parameters."""
        if params not in self._known:
            self._known[params] = self._stock(params)
        return self._known[params]


def make_folder(row: OracleRow, folder: Path) -> Path:
    """Writes the row's tiny model."""
    load_family(row.family).tiny(folder, row.variant, 0)
    return folder


def run(engine: DitEngine, events: list[Event]) -> dict[str, Tensors]:
    """Ticks to the end; appends to `events`. Returns final tensors by request."""
    while engine.busy:
        events += engine.tick()
    return {event.request_id: event.tensors for event in events if isinstance(event, Finished)}


def equal(ours: Tensors, theirs: Tensors) -> bool:
    """Whether both have the same tensors, bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def difference(ours: Tensors, theirs: Tensors) -> float:
    """The largest max|a - b| / max|b| of the tensors."""
    assert ours.keys() == theirs.keys()
    return max(relative(ours[name], theirs[name]) for name in theirs)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max|a - b| / max|b|."""
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def _one_by_one(part: TextPart) -> Callable[[object, Sequence[TextInput]], list[Tensors]]:
    return lambda model, inputs: [tensors for item in inputs for tensors in part.encode(model, [item])]
