"""From a config to an engine: weights, features in their order, warm-up."""

from __future__ import annotations

from dataclasses import replace

import torch

from dit_svc.engine import DitEngine
from dit_svc.idle_experts import ONE_EXPERT, WITH_HSDP, IdleExperts
from services.config import StageConfig
from services.describe import limits_of, open_model, placement
from services.errors import StartupError
from services.families import load_family
from services.family import DitModel, DitPart
from services.feature_set import FeatureSet, apply_features, chosen_features
from services.parallel.degrees import Degrees
from services.parallel.mesh import Mesh, PlannedMesh
from services.parallel.partition import Partition
from services.request import GenerationParams, Limits, ResolvedParams, resolve
from services.weights import ModelSource

WARMUP_SIDE_PX = 208
WARMUP_TEXT_TOKENS = 23
# With guidance a request brings two rows, without it one: batches of several rows and of one are different graphs,
# and only the former have texts of unequal length.
WARMUP_GUIDANCES = (4.0, 1.0)


def open_engine(config: StageConfig, mesh: Mesh | None = None) -> tuple[DitEngine, FeatureSet]:
    """Loads the denoiser that a config names; also returns the features that are on.

    Args:
        mesh: of the group, on a rank of several.

    Raises:
        StartupError: weights that cannot be served, or features or degrees that do not fit.
    """
    source = open_model(config.model)
    family = load_family(source.family)
    _check_offload(config, len(family.dit.experts(source)), mesh is not None and mesh.degrees.hsdp)
    source = with_expert(source, family.dit, config.engine.expert)
    if mesh is not None:
        source = _cut(source, family.dit, mesh)
    model, idle = _load(config, source, family.dit, mesh)
    axes = mesh.active if mesh is not None else frozenset()
    features = apply_features(model, family.dit, config.features, axes)
    engine = DitEngine(model, family.dit, config.engine, mesh, features.wrap, idle)
    if config.engine.warmup:
        for guidance in WARMUP_GUIDANCES:
            # Pictures come as latents, among the conditions.
            limits = limits_of(config, source).without_inputs()
            # A replica of one expert makes its own steps of an ordinary request.
            steps = limits.default_steps if config.engine.expert else 2
            params = _warmup_params(config.model.name, limits, guidance, steps)
            engine.warm_up(params, family.dit.example_conditions(model, params, WARMUP_TEXT_TOKENS))
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
    features.seal()
    return engine, features


def check_layout(config: StageConfig) -> None:
    """Whether the denoiser that a config names can be spread over ranks, and have its features. No weights are needed.

    Raises:
        StartupError: it cannot, with numbers that would do.
    """
    source = open_model(config.model)
    part = load_family(source.family).dit
    axes = PlannedMesh(Degrees.of(config.parallel), 0).active
    # GPUs are taken to read each other's memory until their ranks know.
    axes |= {f"{axis} by peers" for axis in axes}
    chosen_features(part.plan, placement(config.model)[0].type, config.features, axes)
    _check_offload(config, len(part.experts(source)), "hsdp" in axes)
    # Shards of HSDP fit every model, and would need process groups.
    mesh = PlannedMesh(replace(Degrees.of(config.parallel), hsdp_shard=1, hsdp_replicate=1), 0)
    source = _cut(with_expert(source.without_weights(), part, config.engine.expert), part, mesh)
    part.load(source, torch.device("meta"), torch.float32)


def _cut(source: ModelSource, part: DitPart, mesh: Mesh) -> ModelSource:
    """The source of what this rank holds."""
    if mesh.degrees.tensor * mesh.degrees.pipeline == 1 and not mesh.degrees.expert:
        return source
    return replace(source, partition=Partition(part.plan, part.blocks, mesh))


def with_expert(source: ModelSource, part: DitPart, expert: str) -> ModelSource:
    """The source of that expert's weights alone; the same one for "".

    Raises:
        StartupError: the model has no such expert.
    """
    experts = part.experts(source)
    if expert and (expert not in experts or len(experts) < 2):
        has = ", ".join(experts) if len(experts) > 1 else "1 only, without a name"
        raise StartupError(f"{source.spec} has no expert {expert!r}: it has {has}")
    return replace(source, expert=expert)


def _check_offload(config: StageConfig, experts: int, hsdp: bool) -> None:
    if not config.engine.offload_experts:
        return
    if config.engine.expert:
        raise StartupError("engine.offload_experts does not go with engine.expert: 1 expert is held, and none is idle")
    if experts < 2:
        raise StartupError(ONE_EXPERT)
    if hsdp:
        raise StartupError(WITH_HSDP)
    if "graphs" in config.features:
        raise StartupError("engine.offload_experts does not go with CUDA graphs: a graph holds weights in 1 place")


def _load(
    config: StageConfig, source: ModelSource, part: DitPart, mesh: Mesh | None
) -> tuple[DitModel, IdleExperts | None]:
    device, dtype = placement(config.model)
    offloads, shards = config.engine.offload_experts, mesh is not None and mesh.degrees.hsdp
    # A GPU need not have room for what it will not hold.
    through_host = offloads or shards
    source = replace(source, drawn_on=device)
    model = replace(part.load(source, torch.device("cpu") if through_host else device, dtype), device=device)
    return model, IdleExperts(model, device) if offloads else None


def _warmup_params(model: str, limits: Limits, guidance: float, steps: int) -> ResolvedParams:
    # Sizes that are odd for the model, so that no dimension is mistaken for another one's.
    side = min(limits.max_side_px, max(limits.min_side_px, WARMUP_SIDE_PX)) // limits.size_multiple_px
    side *= limits.size_multiple_px
    wish = GenerationParams(
        model=model,
        prompt="warm-up",
        width=side,
        height=side + limits.size_multiple_px,
        num_frames=min(limits.max_frames, 2 * limits.frame_multiple + 1),
        steps=steps,
        guidance=min(guidance, limits.max_guidance),
    )
    return resolve(wish, limits, seed=0)
