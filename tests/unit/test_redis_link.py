"""How Redis is named, what is refused, and that a password shows nowhere; the ACL names what the scripts call."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from gateway import listener
from gateway.config import RedisSection
from gateway.redis_link import open_redis, refusal_of
from gateway.state import State
from services.config import TlsSection
from services.errors import StartupError
from tests.cluster.redis_process import Relay, redis_process

ROOT = Path(__file__).resolve().parents[2]
# What the gateway calls outside of its scripts, and redis-py when it connects.
OUTSIDE = {"evalsha", "script|load", "ping", "info", "select", "subscribe", "unsubscribe"}
OUTSIDE |= {"zrevrange", "hget", "hgetall", "hmget", "get", "set"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://h:1", r"redis.url starts with 'http': use one of redis, rediss, unix, sentinel, sentinels"),
        ("redis://:hunter/2@h:1/0", r"redis.url cannot be read: .*%XX"),
        ("redis://:hunter[2@h:1/0", r"redis.url cannot be read"),
        ("sentinel://h:1,k:2", r"names no service"),
        ("sentinel://h:x/service", r"no Sentinel's address in 'h:x'"),
        ("sentinel://h:1/service?db=hunter", r"write the number of a database"),
    ],
)
def test_wrong_urls(url: str, message: str) -> None:
    with pytest.raises(StartupError, match=message) as error:
        open_redis(RedisSection(url=url))
    assert "hunter" not in str(error.value).replace("db=hunter", "")
    assert error.value.__cause__ is None


def test_certificates_need_a_url_for_them(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="tls: .* cannot be read"):
        open_redis(RedisSection(url="rediss://h:1", tls=TlsSection(ca=str(tmp_path / "none"))))
    with pytest.raises(StartupError, match="write rediss://"):
        open_redis(RedisSection(url="redis://h:1", tls=TlsSection(ca="system")))


async def test_credentials_come_from_the_url_or_its_file(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("sentinel://me:a%40b@h:1,k/service?db=3\n")
    client = open_redis(RedisSection(url_file=str(file)))
    options = client.connection_pool.connection_kwargs
    assert (options["username"], options["password"], options["db"]) == ("me", "a@b", 3)
    assert "a@b" not in repr(RedisSection(url="redis://:a@b@h")) + repr(client)
    options = open_redis(RedisSection(url="redis://:pw@h:7/2")).connection_pool.connection_kwargs
    assert (options["password"], options["host"], options["port"], options["db"]) == ("pw", "h", 7, 2)
    with pytest.raises(StartupError, match="url_file .* cannot be read"):
        open_redis(RedisSection(url_file=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("info", "refusal"),
    [
        ({"redis_version": "7.0.15", "maxmemory_policy": "noeviction"}, ""),
        ({"redis_version": "6.2.14", "maxmemory_policy": "noeviction"}, "at least 7.0"),
        ({"redis_version": "9.1.2", "maxmemory_policy": "allkeys-lru"}, "set it to noeviction"),
        ({"redis_version": "9.1.2"}, "is unknown: set it to noeviction"),
    ],
)
def test_servers_that_may_forget_are_refused(info: dict[str, str], refusal: str) -> None:
    assert refusal in refusal_of(info) and bool(refusal) == bool(refusal_of(info))


def test_the_acl_allows_what_the_gateway_calls_and_nothing_else() -> None:
    scripts = "".join(path.read_text() for path in (ROOT / "gateway/lua").glob("*.lua"))
    called = {name.lower() for name in re.findall(r"redis\.call\('(\w+)'", scripts)}
    line = (ROOT / "deploy/redis/gateway.acl").read_text().splitlines()[-1]
    allowed = set(re.findall(r" \+(\S+)", line))
    assert allowed == called | OUTSIDE
    assert " -@all " in line and " ~{ll}* " in line and " &{ll}:wake " in line


async def test_the_listener_follows_a_failover_that_breaks_no_connection(tmp_path: Path, monkeypatch) -> None:
    """The old primary stays up, read-only, and its connections stand: only silence tells."""
    monkeypatch.setattr(listener, "SILENCE_S", 0.2)
    with redis_process(tmp_path / "old") as old, redis_process(tmp_path / "new") as new:
        async with Relay(old.port) as relay:
            one = State(RedisSection(url=f"redis://127.0.0.1:{relay.port}"), "one")
            heard: list[str] = []
            listening = asyncio.create_task(one.listen(lambda: None, heard.append, lambda _: None))
            async with asyncio.timeout(20):
                while not one.connected:
                    await asyncio.sleep(0.01)
                relay.target = new.port
                # A primary of its own that nobody reaches: what was the primary can be written to no more.
                old.admin().replicaof("127.0.0.1", "1")
                while "cancelled-there" not in heard:
                    new.admin().publish("{ll}:wake", "c:other:cancelled-there")
                    await asyncio.sleep(0.05)
            listening.cancel()
            await one.close()
