"""The gateway's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySection:
    """Where it listens, and what it allows. Times in seconds; `max_body_bytes` of a REST request."""

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 50050
    name: str = ""
    lease_s: float = 10.0
    max_attempts: int = 3
    max_queued: int = 10_000
    request_timeout_s: float = 3600.0
    keep_s: float = 86_400.0
    max_body_bytes: int = 12 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisSection:
    """The state store."""

    url: str = "redis://127.0.0.1:6379/0"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSection:
    """The artifact store that all gateways share (docs/artifacts.md). Times in seconds.

    `path` is a folder or `s3://bucket/prefix`; `endpoint_url` is for S3 services other than Amazon's. Links to
    artifacts are signed with the key in `link_key_file`, else with one that the gateways share through Redis, and hold
    for `link_s`. Every `sweep_s`, what no request needs goes, but nothing younger than `sweep_age_s`.
    """

    path: str = "artifacts"
    endpoint_url: str = ""
    link_key_file: str = ""
    link_s: float = 3600.0
    sweep_s: float = 600.0
    sweep_age_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesSection:
    """Where replicas are: `static:host:port,...`, `dns:///name:port`, or `file:PATH` with one host:port a line."""

    text_encoder: str = ""
    dit: str = ""
    vae: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """All sections."""

    gateway: GatewaySection = field(default_factory=GatewaySection)
    redis: RedisSection = field(default_factory=RedisSection)
    store: StoreSection = field(default_factory=StoreSection)
    stages: StagesSection = field(default_factory=StagesSection)
