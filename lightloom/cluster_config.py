"""What `lightloom up` runs: models, replicas and ports, as one TOML file.

Read by the launcher only; each service gets a config of its own made from this one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gateway.config import AccessSection, InputsSection
from services.config import EngineSection, ParallelSection, TlsSection, parse, read_toml
from services.errors import StartupError
from services.families import FAMILIES
from services.features import ORDER
from services.parallel.degrees import DIT_AXES, TEXT_AXES, VAE_AXES, Degrees, check_axes, check_tiles
from services.request import InterpolationLimits, Limits

STAGES = ("text_encoder", "dit", "vae")
INTERPOLATION = "interpolation"
"""The stage that serves all models together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayEntry:
    """The door of the cluster. Port 0 takes a free one. The sections are those of a gateway (`gateway/config.py`)."""

    host: str = "127.0.0.1"
    http_port: int = 8080
    # Lower than what the kernel gives to outgoing connections (`services/free_port.py`), one of which could have it.
    grpc_port: int = 8081
    public_url: str = ""
    replicas: int = 1
    access: AccessSection = field(default_factory=AccessSection)
    inputs: InputsSection = field(default_factory=InputsSection)
    tls: TlsSection = field(default_factory=TlsSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertEntry:
    """The denoisers that hold one expert of a model, and their device where it is not the model's."""

    replicas: int = 1
    device: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One model: its weights (see services.config.ModelSection) and how many replicas each stage gets.

    `parallel` spreads each replica of the denoiser over ranks, `text_parallel` each of the text encoder,
    `vae_parallel` each of the VAE. With `experts`, each denoiser holds one of them; there is none that holds all.
    """

    source: str
    family: str = ""
    preset: str = ""
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    max_in_flight: int = 16
    engine: EngineSection = field(default_factory=EngineSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    text_parallel: ParallelSection = field(default_factory=ParallelSection)
    vae_parallel: ParallelSection = field(default_factory=ParallelSection)
    features: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    replicas: Mapping[str, int] = field(default_factory=dict)
    experts: Mapping[str, ExpertEntry] = field(default_factory=dict)

    @property
    def stages(self) -> dict[str, int]:
        """Replicas by stage, where `replicas` does not say otherwise; denoisers of one expert are `dit.EXPERT`."""
        denoisers = {f"dit.{name}": expert.replicas for name, expert in self.experts.items()}
        return {"text_encoder": 1, **(denoisers or {"dit": 1}), "vae": 1}

    def parallel_of(self, kind: str) -> ParallelSection:
        """How replicas of one of `stages` are spread over ranks."""
        sections = {"dit": self.parallel, "text_encoder": self.text_parallel, "vae": self.vae_parallel}
        return sections[kind.partition(".")[0]]


@dataclass(frozen=True, slots=True, kw_only=True)
class InterpolationEntry:
    """The interpolator of all models' clips, and how many replicas it gets.

    `source` is a file of IFNet's weights; `packaged` is the one in `interpolation_svc` (docs/interpolation.md).
    """

    source: str = "packaged"
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    max_in_flight: int = 16
    engine: EngineSection = field(default_factory=EngineSection)
    limits: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """A whole cluster on one machine. Without `redis_url`, Redis is found or embedded.

    Without a section `interpolation`, no frames are interpolated.

    `store` holds keys of the gateways' section of that name; without a `path`, artifacts are in the run directory.
    """

    models: Mapping[str, ModelEntry]
    gateway: GatewayEntry = field(default_factory=GatewayEntry)
    interpolation: InterpolationEntry | None = None
    store: Mapping[str, Any] = field(default_factory=dict)
    redis_url: str = ""


def load_cluster(path: Path) -> ClusterConfig:
    """Reads and checks a cluster file, but not what it names (`check_files`).

    Raises:
        StartupError: what is wrong with it.
    """
    config = parse(ClusterConfig, read_toml(path))
    if not config.models:
        raise StartupError(f"{path} names no model: add a [models.NAME] section with a source")
    for name, entry in config.models.items():
        check_replicas(entry.replicas, f"models.{name}.replicas")
        try:
            _check_degrees(entry)
        except StartupError as error:
            raise StartupError(f"model {name!r}: {error}") from error
        _check_experts(f"models.{name}", entry)
        parse(Limits, entry.limits, f"models.{name}.limits.")
        for feature in entry.features:
            if feature not in ORDER:
                raise StartupError(f"models.{name}: unknown feature {feature!r}: there are {', '.join(ORDER)}")
    if config.interpolation is not None:
        check_count(config.interpolation.replicas, "interpolation.replicas")
        parse(InterpolationLimits, config.interpolation.limits, "interpolation.limits.")
    return config


def _check_degrees(entry: ModelEntry) -> None:
    check_axes(Degrees.of(entry.parallel), DIT_AXES, "Dit")
    check_axes(Degrees.of(entry.text_parallel), TEXT_AXES, "TextEncoder")
    check_axes(Degrees.of(entry.vae_parallel), VAE_AXES, "Vae")
    if entry.vae_parallel.vae_patch_parallel_size > 1:
        check_tiles(entry.vae_parallel.vae_patch_mode, entry.engine.tile_px)


def _check_experts(where: str, entry: ModelEntry) -> None:
    if not entry.experts:
        return
    for name, expert in entry.experts.items():
        check_count(expert.replicas, f"{where}.experts.{name}.replicas")
    for key, given in (
        ("replicas.dit", "dit" in entry.replicas),
        ("engine.expert", entry.engine.expert),
        ("engine.offload_experts", entry.engine.offload_experts),
    ):
        if given:
            raise StartupError(f"{where}.{key} does not go with {where}.experts: 1 denoiser holds 1 expert there")


def check_stage(model: str, entry: ModelEntry, stage: str) -> None:
    """Raises StartupError for a stage that the model has not: denoisers hold all experts, or one each."""
    if stage not in entry.stages:
        raise StartupError(f"model {model!r} has no stage {stage!r}: there are {', '.join(entry.stages)}")


def _check_interpolation(source: str) -> None:
    packaged = Path(__file__).parents[1] / "interpolation_svc" / "weights.safetensors"
    if source == "packaged" and not packaged.is_file():
        raise StartupError(
            f"interpolation.source is 'packaged', and {packaged.name} is missing here: name a file of IFNet's weights"
        )
    if source != "packaged" and not Path(source).is_file():
        raise StartupError(f"interpolation.source {Path(source).absolute()} does not exist")


def stage_table(config: ClusterConfig, model: str, kind: str) -> dict[str, Any]:
    """The config of a replica, but for its name and ports.

    Args:
        model: whose stage it is; "" for the interpolator.
        kind: the stage, or `dit.EXPERT`.
    """
    stage, _, expert = kind.partition(".")
    entry = config.interpolation if stage == INTERPOLATION else config.models[model]
    assert entry is not None
    table: dict[str, Any] = {
        "service": {"max_in_flight": entry.max_in_flight},
        "model": {
            "name": model or stage,
            "source": entry.source,
            "device": entry.device,
            "dtype": entry.dtype,
            "threads": entry.threads,
        },
        "engine": asdict(entry.engine),
        "limits": entry.limits,
    }
    if isinstance(entry, ModelEntry):
        table["model"] |= {"family": entry.family, "preset": entry.preset}
        table["features"] = entry.features if stage == "dit" else {}
        table["parallel"] = asdict(entry.parallel_of(kind))
        if expert:
            table["model"]["device"] = entry.experts[expert].device or entry.device
            table["engine"]["expert"] = expert
    return table


def check_files(config: ClusterConfig) -> None:
    """Whether everything that the config names is there; a stage would find out after half a minute only.

    Raises:
        StartupError: what is missing, and where it was looked for.
    """
    for name, entry in config.models.items():
        _check_source(f"models.{name}", entry)
    interpolation = config.interpolation
    if interpolation is not None:
        _check_interpolation(interpolation.source)
    keys = config.gateway.access.keys_file
    if keys and not Path(keys).is_file():
        raise StartupError(
            f"gateway.access.keys_file {Path(keys).absolute()} does not exist: make a key with "
            f"`lightloom key create --file {keys}` (paths are relative to the working directory)"
        )


def _check_source(where: str, entry: ModelEntry) -> None:
    if entry.source.startswith("random:"):
        if entry.family not in FAMILIES:
            families = ", ".join(sorted(FAMILIES))
            raise StartupError(f"{where}: {entry.source} needs a family and a preset: families are {families}")
        return
    folder = Path(entry.source)
    if not folder.is_dir():
        raise StartupError(f"{where}: model folder {folder} does not exist (looked for {folder.absolute()})")
    if not (folder / "model_index.json").is_file():
        raise StartupError(f"{where}: {folder.absolute()} has no model_index.json: name a diffusers-format folder")


def check_replicas(replicas: Mapping[str, int], where: str, stages: Sequence[str] = STAGES) -> None:
    """Raises StartupError for an unknown stage or a count outside 0 to 64."""
    for stage, count in replicas.items():
        if stage not in stages:
            raise StartupError(f"{where}: unknown stage {stage!r}, there are {', '.join(stages)}")
        check_count(count, f"{where}.{stage}")


def check_count(count: int, where: str) -> None:
    """Raises StartupError for a count outside 0 to 64."""
    if not 0 <= count <= 64:
        raise StartupError(f"{where} is {count}: it must be between 0 and 64")


def parse_replicas(settings: list[str]) -> dict[str, int]:
    """`["dit=2", "vae=1"]` as a mapping; whether a model has an expert `dit.EXPERT` is for `check_stage`.

    Raises:
        StartupError: says how to write it.
    """
    replicas = {}
    for setting in settings:
        stage, _, count = setting.partition("=")
        if not count.isdigit():
            raise StartupError(f"{setting!r}: write it as STAGE=COUNT, for example dit=2")
        replicas[stage] = int(count)
    experts = [stage for stage in replicas if stage.startswith("dit.")]
    check_replicas(replicas, "replicas", (*STAGES, INTERPOLATION, *experts))
    return replicas


def write_toml(path: Path, table: Mapping[str, Any]) -> None:
    """Writes nested mappings of plain values; JSON's scalars and lists are TOML's too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(_lines(table, ())) + "\n")


def _lines(table: Mapping[str, Any], section: tuple[str, ...]) -> list[str]:
    lines = [f"[{'.'.join(section)}]"] if section else []
    lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += ["", *_lines(value, (*section, key))]
    return lines
