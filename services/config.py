"""TOML to frozen dataclasses: the only file that reads configuration and the environment.

Every process takes `--config FILE` and `--set section.key=value`. A key that no dataclass has is an error
that names the keys there are; nothing is guessed and nothing is ignored.
"""

from __future__ import annotations

import os
import socket
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from services.errors import StartupError

T = TypeVar("T")

# glibc maps and trims every large block anew unless told otherwise: tensor chunks then cost twice the CPU. And it keeps
# a heap for each of gRPC's threads: with two, a relay grows half as much. Read when a process starts, before exec.
MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
    "MALLOC_ARENA_MAX": "2",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSection:
    """Where a stage service listens and how much it takes.

    Units: timeouts in seconds. `max_in_flight` counts requests held at once, queued in the replica included; `max_cost`
    is what they may cost together (megapixel-steps times guidance branches, 0 for any): one larger request comes alone.
    `health_port` answers health checks alone, in plain text, for probes that have no client certificate.
    """

    host: str = "127.0.0.1"
    port: int
    metrics_port: int = 0
    health_port: int = 0
    name: str = ""
    max_in_flight: int = 16
    max_cost: float = 0.0
    drain_timeout_s: float = 30.0
    start_timeout_s: float = 1800.0
    hang_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSection:
    """Certificates as PEM files (`services/tls.py`); all empty: plain text.

    A server shows `cert`, and with a `ca` it takes only clients that show a certificate signed by it. A client takes
    only servers signed by `ca` (`system`: by a public authority) and shows `cert`, if it has one; the name in the
    server's certificate must be `server_name`, or, without one, the host that was called.
    """

    cert: str = ""
    key: str = ""
    ca: str = ""
    server_name: str = ""

    @property
    def on(self) -> bool:
        """Whether it is TLS at all."""
        return bool(self.cert or self.key or self.ca)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """Which weights. `source` is a diffusers-format folder or `random:SEED` with a `preset` of the family.

    `device` is `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`; `dtype` is `auto` (bfloat16 on
    CUDA, float32 on CPU), `float32`, `bfloat16` or `float16`.
    """

    name: str
    source: str
    family: str = ""
    preset: str = ""
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSection:
    """Degrees of the rank group; they multiply to the number of ranks (`services/parallel/degrees.py`).

    `world_size` may be left out (0); given, it must be their product. `tensor_sequence_parallel` spreads norms and
    residuals over the ranks of `tensor_parallel_size`. `vae_patch_mode` is how the VAE's ranks share a picture: `exact`
    (rows, with what layers need of their neighbours) or `tiles` (of `engine.tile_px`). A group over several hosts names
    the others' agents (`host:port`; each host gets an equal share of the ranks), this host's address as they reach it,
    and the file with the token that the agents were started with.
    """

    world_size: int = 0
    cfg_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    ulysses_degree: int = 1
    ring_degree: int = 1
    tensor_parallel_size: int = 1
    tensor_sequence_parallel: bool = False
    hsdp_shard_size: int = 1
    hsdp_replicate_size: int = 1
    enable_expert_parallel: bool = False
    vae_patch_parallel_size: int = 1
    vae_patch_mode: str = "exact"
    hosts: tuple[str, ...] = ()
    leader_address: str = ""
    agent_token_file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSection:
    """How a stage's engine forms batches.

    `max_batch` rows at most share a forward. `branches` runs guidance branches as `rows` of one batch, one
    after the other (`serial`), or by a rule of thumb on the token count (`auto`).
    `cache_bytes` bounds the text encoder's embedding cache. `tile_px` is the VAE's tile side; 0: no tiling.
    `vae_compile` compiles the VAE's decoder for the default size (other sizes run as without it).
    `offload_experts` keeps one expert of a denoiser on the device and the others in the host's pinned memory.
    `expert` is the one that a denoiser holds, where other replicas hold the others; empty: all.
    """

    max_batch: int = 8
    branches: str = "auto"
    cache_bytes: int = 256 * 1024 * 1024
    tile_px: int = 0
    vae_compile: bool = False
    offload_experts: bool = False
    expert: str = ""
    warmup: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """One stage service. Each section of `features` is parsed by the feature that owns it."""

    service: ServiceSection
    model: ModelSection
    tls: TlsSection = field(default_factory=TlsSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    engine: EngineSection = field(default_factory=EngineSection)
    features: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)


def read_toml(path: Path) -> dict[str, Any]:
    """The table in `path`.

    Raises:
        StartupError: the file is missing or not TOML (with line and column).
    """
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise StartupError(f"config file {path} does not exist") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"config file {path} is not valid TOML: {error}") from error


def override(table: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Applies `a.b=value` settings; values are TOML (strings may stay unquoted).

    Raises:
        StartupError: a setting without `=`, or a path through a value that is not a table.
    """
    for setting in settings:
        path, sign, text = setting.partition("=")
        if not sign or not path:
            raise StartupError(f"--set {setting!r}: write it as section.key=value")
        *sections, key = path.split(".")
        target = table
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise StartupError(f"--set {setting!r}: {section!r} is a value, not a section")
        target[key] = _toml_value(text)
    return table


def parse(cls: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """Builds the dataclass `cls` from `table`, checking keys and types.

    Args:
        where: path of the table, for messages ("model.").

    Raises:
        StartupError: unknown or missing key, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(typing.cast(Any, cls))}
    for key in table:
        if key not in known:
            raise StartupError(f"unknown config key {where}{key}: allowed are {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    for name, spec in known.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], f"{where}{name}")
        elif spec.default is MISSING and spec.default_factory is MISSING:
            if is_dataclass(hints[name]):
                values[name] = parse(typing.cast(type[Any], hints[name]), {}, f"{where}{name}.")
            else:
                raise StartupError(f"config key {where}{name} is missing")
    return cls(**values)


def environment(name: str) -> str | None:
    """An environment variable, or None when unset or empty. The one place where they are read."""
    return os.environ.get(name) or None


def choose_interface(address: str) -> None:
    """Has torch.distributed use the interface by which this host reaches `address`; it would go by the hostname."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def environment_with_malloc() -> dict[str, str]:
    """This process's environment with what a child must have before its exec: allocator, OpenMP, no bars in logs.

    Idle OpenMP workers spin for a while before they sleep. Several stages on a few cores take that time from each
    other: with 8 clients on 2 cores, the demo cluster made 0.75 pictures a second with the default and 1.5 with this.
    """
    return {"GOMP_SPINCOUNT": "10000", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **os.environ, **MALLOC_SETTINGS}


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise StartupError(f"config key {where} must be a section")
        return parse(typing.cast(type[Any], hint), value, f"{where}.")
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(next(a for a in args if a is not type(None)), value, where)
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise StartupError(f"config key {where} must be a list, not {value!r}")
        return tuple(_convert(args[0], item, where) for item in value)
    if origin in (Mapping, dict) or typing.get_origin(hint) is not None:
        if not isinstance(value, Mapping):
            raise StartupError(f"config key {where} must be a section, not {value!r}")
        inner = args[1]
        return {key: item if inner is Any else _convert(inner, item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise StartupError(f"config key {where} must be of type {hint.__name__}, not {value!r}")
    return value


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
