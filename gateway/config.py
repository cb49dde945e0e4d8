"""The gateway's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.config import TlsSection
from services.errors import StartupError

MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0
_POSITIVE = (
    *("max_queued", "max_queued_tenant", "max_queued_cost", "max_queued_bytes"),
    *("max_held_bytes", "age_s", "request_timeout_s", "keep_s"),
    *("body_timeout_s", "max_connections", "drain_s"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySection:
    """Where it listens, and what it allows. Times in seconds.

    A REST request's body may have `max_body_bytes` and take `body_timeout_s`; the REST front keeps `max_connections`
    open, and answers those beyond with 503.

    `health_port` answers gRPC health checks alone, in plain text, for probes: those of Kubernetes know no TLS.

    `checkpoint_every_s` is the denoising that a fault may cost: requests that take no longer have no checkpoints.

    `max_queued` requests may wait for a component, `max_queued_tenant` of one tenant; all of them together may cost
    `max_queued_cost` (megapixel-steps times guidance branches), and their parameters, pictures included, take
    `max_queued_bytes` of Redis. Requests in work may hold `max_held_bytes` of this gateway's memory. One that has
    waited `age_s` moves up a priority class.

    Told to stop, it lets nobody new in, and goes on for `drain_s` at most until those that wait have their
    answer.

    `public_url` begins the links of the images call, where clients reach the gateway under another name than the one
    they call it by: `https://pictures.example`. Without it, links have the scheme and host of the call.
    """

    host: str = "127.0.0.1"
    http_port: int = 8080
    # Lower than what the kernel gives to outgoing connections (`services/free_port.py`), one of which could have it.
    grpc_port: int = 8081
    health_port: int = 0
    public_url: str = ""
    name: str = ""
    lease_s: float = 10.0
    max_attempts: int = 3
    checkpoint_every_s: float = 15.0
    max_queued: int = 10_000
    max_queued_tenant: int = 10_000
    max_queued_cost: float = 1e6
    max_queued_bytes: int = 256 * 1024 * 1024
    max_held_bytes: int = 512 * 1024 * 1024
    age_s: float = 300.0
    request_timeout_s: float = 3600.0
    keep_s: float = 86_400.0
    max_body_bytes: int = 12 * 1024 * 1024
    body_timeout_s: float = 60.0
    max_connections: int = 4096
    drain_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessSection:
    """Who may call: the keys in a file (`lightloom key`); without, this machine only, unless anonymous is allowed."""

    keys_file: str = ""
    allow_anonymous: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InputsSection:
    """Pictures by URL. `image_hosts`: `HOST`, `HOST:PORT` (https), or `http://HOST:PORT`; empty: URLs are refused.

    Hosts must have public addresses, or ones in `image_networks` (`10.1.0.0/16`), and certificates of a public
    authority, or of `image_ca` (PEM). Seconds are for a whole picture.
    """

    image_hosts: tuple[str, ...] = ()
    image_networks: tuple[str, ...] = ()
    image_ca: str = ""
    fetch_timeout_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisSection:
    """The state store. A URL with a password belongs into a file that only the gateway can read: `url_file`.

    `redis://`, `rediss://` (TLS), `unix://`, or `sentinel://HOST:PORT,HOST:PORT/SERVICE` (`sentinels://` with TLS),
    whose password and database are those of the servers; what Sentinels themselves ask for is in a file of its own.
    """

    url: str = field(default="redis://127.0.0.1:6379/0", repr=False)
    url_file: str = ""
    sentinel_password_file: str = ""
    tls: TlsSection = field(default_factory=TlsSection)


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
    """Where replicas are: `static:host:port,...`, `dns:///name:port`, or `file:PATH` with one host:port a line.

    Those of interpolation serve all models together, and need not be there.
    """

    text_encoder: str = ""
    dit: str = ""
    vae: str = ""
    interpolation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """All sections. `tls` is that of its gRPC and REST fronts, `stage_tls` what it shows to stages and asks of them.
    `tenants` has the weights of those that do not get 1.

    Raises:
        StartupError: a value is out of its range.
    """

    gateway: GatewaySection = field(default_factory=GatewaySection)
    access: AccessSection = field(default_factory=AccessSection)
    inputs: InputsSection = field(default_factory=InputsSection)
    tls: TlsSection = field(default_factory=TlsSection)
    stage_tls: TlsSection = field(default_factory=TlsSection)
    redis: RedisSection = field(default_factory=RedisSection)
    store: StoreSection = field(default_factory=StoreSection)
    stages: StagesSection = field(default_factory=StagesSection)
    tenants: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, weight in self.tenants.items():
            if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
                raise StartupError(
                    f"config key tenants.{name} is {weight}: a weight must be between {MIN_WEIGHT} and {MAX_WEIGHT:g}"
                )
        url = self.gateway.public_url
        if url and not url.startswith(("http://", "https://")):
            raise StartupError(f"config key gateway.public_url is {url!r}: write it as https://HOST")
        for key in _POSITIVE:
            value = getattr(self.gateway, key)
            if not 0 < value < math.inf:
                raise StartupError(f"config key gateway.{key} is {value}: it must be above 0 and finite")


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
