"""What a replica says of itself: its config and weights as a DescribeResponse. Used by rank programs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import torch

from protos import types_pb2
from services.config import ModelSection, StageConfig, parse
from services.errors import StartupError
from services.families import load_family
from services.features import ORDER
from services.parallel.degrees import Degrees
from services.request import Limits
from services.weights import ModelSource, open_source
from services.wire import limits_to_proto

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_model(model: ModelSection) -> ModelSource:
    """The source a config names.

    Raises:
        StartupError: it does not exist, or no family serves it.
    """
    return open_source(model.source, family=model.family, preset=model.preset)


def placement(model: ModelSection) -> tuple[torch.device, torch.dtype]:
    """Device and dtype a config asks for.

    Raises:
        StartupError: there is no such device, or the dtype is unknown.
    """
    name = model.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise StartupError(f"model.device is {model.device!r}, but this machine has no CUDA device: use auto or cpu")
    device = torch.device(name)
    if model.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    if model.dtype not in _DTYPES:
        raise StartupError(f"model.dtype {model.dtype!r} is unknown: use auto, {', '.join(_DTYPES)}")
    return device, _DTYPES[model.dtype]


def limits_of(config: StageConfig, source: ModelSource) -> Limits:
    """The variant's limits, with what the config's `[limits]` changes.

    Raises:
        StartupError: an unknown key or a wrong type.
    """
    limits = load_family(source.family).variants[source.variant].limits
    changes = parse(Limits, config.limits, "limits.")
    return replace(limits, **{f.name: getattr(changes, f.name) for f in fields(Limits) if f.name in config.limits})


def describe(
    config: StageConfig,
    stage: types_pb2.Stage,
    source: ModelSource,
    subfolders: Sequence[str],
    features: Mapping[str, str] | None = None,
) -> types_pb2.DescribeResponse:
    """Everything a rank knows; the front adds what only it knows.

    Args:
        subfolders: of the weights this stage reads; its component id is made of them.
        features: resolved options of the features that are on, as JSON by name.
    """
    device, dtype = placement(config.model)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return types_pb2.DescribeResponse(
        stage=stage,
        component_id=source.component_id(types_pb2.Stage.Name(stage).removeprefix("STAGE_").lower(), subfolders),
        family=source.family,
        variants=[source.variant],
        models=[config.model.name],
        limits=limits_to_proto(limits_of(config, source)),
        features=[_feature(name, options) for name, options in (features or {}).items()],
        device=device_name,
        dtype=str(dtype).removeprefix("torch."),
        world_size=Degrees.of(config.parallel).world,
    )


def _feature(name: str, options: str) -> types_pb2.Feature:
    return types_pb2.Feature(name=name, config=options, exact=importlib.import_module(ORDER[name]).EXACT)
