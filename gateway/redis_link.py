"""Connections to Redis, alone or behind Sentinels, with TLS and an ACL user; and whether a server is fit to be used.

Nothing here, and no error of it, shows a password.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from gateway.config import RedisSection, redis_url
from services.config import TlsSection
from services.errors import StartupError
from services.tls import SYSTEM, read

SCHEMES = ("redis", "rediss", "unix", "sentinel", "sentinels")
CONNECT_TIMEOUT_S = 2.0
# The next Sentinel is asked when one does not answer.
SENTINEL_TIMEOUT_S = 0.5
SENTINEL_PORT = 26379
MIN_VERSION = (7, 0)


def open_redis(section: RedisSection) -> Redis:
    """A client; it connects when it is first used, behind Sentinels to the primary that they name then.

    It tries nothing twice: who calls knows how long it may wait.

    Raises:
        StartupError: the URL, a password file or a certificate cannot be used.
    """
    url = _split(redis_url(section))
    options: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        **_credentials(url),
    }
    secure = _secured(section.tls) if url.scheme in ("rediss", "sentinels") else {}
    if section.tls.on and not secure and url.scheme != "unix":
        raise StartupError(f"redis.tls is set, but redis.url is {url.scheme}://: write {url.scheme}s://")
    if url.scheme in ("sentinel", "sentinels"):
        return _behind_sentinels(url, section, options, secure)
    # Credentials were taken out above: the client's own parser puts what it cannot read into its errors.
    bare = url._replace(netloc=url.netloc.rpartition("@")[2]).geturl()
    return Redis.from_url(bare, **options, **secure)


def refusal_of(info: Mapping[str, Any]) -> str:
    """Why a server cannot hold our state, by its INFO (sections server and memory); "" when it can.

    Any policy but noeviction throws keys away when memory is full: accepted requests would vanish without a word. Under
    noeviction Redis refuses writes instead, and the gateway answers 503.
    """
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
        return f"Redis is version {version}: at least 7.0 is needed"
    policy = str(info.get("maxmemory_policy", "unknown"))
    if policy != "noeviction":
        return f"maxmemory-policy of Redis is {policy}: set it to noeviction, or requests can vanish"
    return ""


async def examine(redis: Redis) -> dict[str, Any]:
    """INFO of a server, sections server and memory; any user may be allowed to read it.

    Raises:
        RedisError: it does not answer, or does not let us.
    """
    server = await cast(Any, redis.info("server"))
    return {**server, **await cast(Any, redis.info("memory"))}


def _split(text: str) -> SplitResult:
    try:
        url = urlsplit(text)
        # Reading it is what checks it; of Sentinels, there are several.
        _ = url.scheme.startswith("sentinel") or url.port
    except ValueError:
        # The reason may quote a piece of the password, so it is left out.
        raise StartupError(
            "redis.url cannot be read: write redis://USER:PASSWORD@HOST:PORT/0, with %XX for each character of the "
            "password that is no letter or digit"
        ) from None
    if url.scheme not in SCHEMES:
        raise StartupError(f"redis.url starts with {url.scheme!r}: use one of {', '.join(SCHEMES)}")
    return url


def _credentials(url: SplitResult) -> dict[str, str]:
    # Not by url.password: it reads hosts and credentials of several hosts alike.
    user, _, password = url.netloc.rpartition("@")[0].partition(":")
    found = {"username": unquote(user), "password": unquote(password)}
    return {name: value for name, value in found.items() if value}


def _secured(tls: TlsSection) -> dict[str, Any]:
    read(tls)
    files = {"ssl_ca_certs": "" if tls.ca == SYSTEM else tls.ca, "ssl_certfile": tls.cert, "ssl_keyfile": tls.key}
    return {name: path for name, path in files.items() if path}


def _behind_sentinels(
    url: SplitResult, section: RedisSection, options: dict[str, Any], secure: dict[str, Any]
) -> Redis:
    addresses = [_address(text) for text in url.netloc.rpartition("@")[2].split(",")]
    service = url.path.strip("/")
    if not service:
        raise StartupError("redis.url names no service: write sentinel://HOST:PORT,HOST:PORT/SERVICE")
    if url.scheme == "sentinels":
        secure = {**secure, "ssl": True}
    asked: dict[str, Any] = {
        "socket_timeout": SENTINEL_TIMEOUT_S,
        "socket_connect_timeout": SENTINEL_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        **secure,
    }
    if section.sentinel_password_file:
        asked["password"] = _password(section.sentinel_password_file)
    database = parse_qs(url.query).get("db", ["0"])[0]
    if not database.isdigit():
        raise StartupError(f"redis.url has db={database}: write the number of a database")
    sentinel = Sentinel(addresses, sentinel_kwargs=asked)  # type: ignore[no-untyped-call]
    return cast(Redis, sentinel.master_for(service, **options, **secure, db=int(database)))


def _password(path: str) -> str:
    try:
        return Path(path).read_text().rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"redis.sentinel_password_file {path} cannot be read: {type(error).__name__}") from error


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if ":" in text else (text, "", str(SENTINEL_PORT))
    if not host or not port.isdigit():
        raise StartupError(f"redis.url has no Sentinel's address in {text!r}: write HOST:PORT")
    return host.strip("[]"), int(port)
