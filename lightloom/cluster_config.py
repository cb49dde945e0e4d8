"""What `lightloom up` runs: models, replicas and ports, as one TOML file.

Read by the launcher only; each service gets a config of its own made from this one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.config import AccessSection, InputsSection
from services.config import EngineSection, ParallelSection, TlsSection, parse, read_toml
from services.errors import StartupError
from services.parallel.degrees import TEXT_AXES, Degrees, check_axes

STAGES = ("text_encoder", "dit", "vae")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayEntry:
    """The door of the cluster. Port 0 takes a free one. The sections are those of a gateway (`gateway/config.py`)."""

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 50050
    public_url: str = ""
    replicas: int = 1
    access: AccessSection = field(default_factory=AccessSection)
    inputs: InputsSection = field(default_factory=InputsSection)
    tls: TlsSection = field(default_factory=TlsSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One model: its weights (see services.config.ModelSection) and how many replicas each stage gets.

    `parallel` spreads each replica of the denoiser over ranks, `text_parallel` each of the text encoder.
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
    features: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    replicas: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """A whole cluster on one machine. Without `redis_url`, Redis is found or embedded.

    `store` holds keys of the gateways' section of that name; without a `path`, artifacts are in the run directory.
    """

    models: Mapping[str, ModelEntry]
    gateway: GatewayEntry = field(default_factory=GatewayEntry)
    store: Mapping[str, Any] = field(default_factory=dict)
    redis_url: str = ""


def load_cluster(path: Path) -> ClusterConfig:
    """Reads and checks a cluster file; model folders are taken relative to the working directory.

    Raises:
        StartupError: what is wrong with it.
    """
    config = parse(ClusterConfig, read_toml(path))
    if not config.models:
        raise StartupError(f"{path} names no model: add a [models.NAME] section with a source")
    for name, entry in config.models.items():
        check_replicas(entry.replicas, f"models.{name}.replicas")
        Degrees.of(entry.parallel)
        check_axes(Degrees.of(entry.text_parallel), TEXT_AXES, "TextEncoder")
    return config


def check_replicas(replicas: Mapping[str, int], where: str) -> None:
    """Raises StartupError for an unknown stage or a count outside 0 to 64."""
    for stage, count in replicas.items():
        if stage not in STAGES:
            raise StartupError(f"{where}: unknown stage {stage!r}, there are {', '.join(STAGES)}")
        if not 0 <= count <= 64:
            raise StartupError(f"{where}.{stage} is {count}: it must be between 0 and 64")


def parse_replicas(settings: list[str]) -> dict[str, int]:
    """`["dit=2", "vae=1"]` as a mapping.

    Raises:
        StartupError: says how to write it.
    """
    replicas = {}
    for setting in settings:
        stage, _, count = setting.partition("=")
        if not count.isdigit():
            raise StartupError(f"{setting!r}: write it as STAGE=COUNT, for example dit=2")
        replicas[stage] = int(count)
    check_replicas(replicas, "replicas")
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
