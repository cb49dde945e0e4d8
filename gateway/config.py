"""The gateway's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from services.errors import StartupError


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySection:
    """Where it listens, and what it allows. Times in seconds; `max_body_bytes` of a REST request.

    `checkpoint_every_s` is the denoising that a fault may cost: requests that take no longer have no checkpoints.
    """

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 50050
    name: str = ""
    lease_s: float = 10.0
    max_attempts: int = 3
    checkpoint_every_s: float = 15.0
    max_queued: int = 10_000
    request_timeout_s: float = 3600.0
    keep_s: float = 86_400.0
    max_body_bytes: int = 12 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisSection:
    """The state store. A URL with a password belongs into a file that only the gateway can read: `url_file`."""

    url: str = "redis://127.0.0.1:6379/0"
    url_file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSection:
    """The artifact store: a folder that all gateways share."""

    path: str = "artifacts"


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


def redis_url(section: RedisSection) -> str:
    """The URL, from its file if there is one.

    Raises:
        StartupError: the file cannot be read, or is empty.
    """
    if not section.url_file:
        return section.url
    try:
        url = Path(section.url_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"redis.url_file {section.url_file} cannot be read: {error}") from error
    if not url:
        raise StartupError(f"redis.url_file {section.url_file} is empty: write the URL into it, redis://HOST:PORT/0")
    return url
