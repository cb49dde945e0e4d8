"""Signed links: good at every gateway, for one path, for their time, and unforgeable. The key is in a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from urllib.parse import parse_qsl, urlsplit

import pytest

from gateway.config import RedisSection
from gateway.links import KEY_AGE_S, Links, content_path
from gateway.state import State
from lightloom.redis_server import start_redis
from services.errors import LinkExpired, LinkRefused, StartupError, StateStoreDown
from services.free_port import free_port

PATH = content_path("r")


@pytest.fixture
async def states(url: str) -> AsyncIterator[tuple[State, State]]:
    states = State(RedisSection(url=url), "a"), State(RedisSection(url=url), "b")
    await states[0]._scripts.redis.flushall()
    yield states
    for state in states:
        await state.close()


def query_of(link: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(link).query))


async def test_a_link_is_good_at_another_gateway(states) -> None:
    own, other = (Links(state.shared_key, "", 60.0) for state in states)
    before = time.time()
    link = await own.link(PATH)
    assert link.startswith(f"{PATH}?expires=")
    assert before + 60 <= int(query_of(link)["expires"]) <= time.time() + 61
    assert await other.is_signed(PATH, query_of(link))
    # It goes both ways: they have one key.
    assert await own.is_signed(PATH, query_of(await other.link(PATH)))


async def test_without_a_signature_it_is_not_signed(states) -> None:
    links = Links(states[0].shared_key, "", 60.0)
    assert not await links.is_signed(PATH, {})
    assert not await links.is_signed(PATH, {"other": "1"})


async def test_what_was_changed_is_refused(states) -> None:
    links = Links(states[0].shared_key, "", 60.0)
    query = query_of(await links.link(PATH))
    expires, signature = query["expires"], query["signature"]
    last = "0" if signature[-1] != "0" else "1"
    wrong = [
        {"expires": expires},
        {"signature": signature},
        {"expires": "", "signature": ""},
        {"expires": str(int(expires) + 1), "signature": signature},
        {"expires": f"0{expires}", "signature": signature},
        {"expires": f"{expires} ", "signature": signature},
        {"expires": expires, "signature": signature[:-1] + last},
        {"expires": expires, "signature": signature.upper() if signature.upper() != signature else "A" * 64},
        {"expires": expires, "signature": signature[:-1]},
        {"expires": "9" * 5000, "signature": signature},
        {"expires": "\u0661\u0662", "signature": "\u0661" * 64},
    ]
    for query in wrong:
        with pytest.raises(LinkRefused):
            await links.is_signed(PATH, query)
    with pytest.raises(LinkRefused):
        await links.is_signed(content_path("s"), {"expires": expires, "signature": signature})
    stranger = Links(states[0].shared_key, "", 60.0)
    stranger._key, stranger._asked_s = b"k" * 32, time.monotonic()
    with pytest.raises(LinkRefused):
        await links.is_signed(PATH, query_of(await stranger.link(PATH)))


async def test_an_expired_link_says_so(states) -> None:
    links = Links(states[0].shared_key, "", 0.001)
    query = query_of(await links.link(PATH))
    while time.time() < int(query["expires"]):
        assert await links.is_signed(PATH, query)
        time.sleep(0.05)
    with pytest.raises(LinkExpired):
        await links.is_signed(PATH, query)


async def test_gateways_agree_again_after_redis_was_emptied(states) -> None:
    own, other = (Links(state.shared_key, "", 60.0) for state in states)
    await own.link(PATH)
    await states[0]._scripts.redis.flushall()
    link = await other.link(PATH)
    with pytest.raises(LinkRefused):
        await own.is_signed(PATH, query_of(link))
    # As time does.
    own._asked_s -= KEY_AGE_S
    assert await own.is_signed(PATH, query_of(link))


async def test_a_gateway_that_had_the_key_goes_on_without_redis(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    server = start_redis(tmp_path / "redis", port=free_port())
    state = State(RedisSection(url=server.url), "a")
    links, late = (Links(state.shared_key, "", 60.0) for _ in range(2))
    link = await links.link(PATH)
    server.stop()
    links._asked_s -= KEY_AGE_S
    known, unknown = await asyncio.gather(
        links.is_signed(PATH, query_of(link)), late.link(PATH), return_exceptions=True
    )
    assert known is True
    assert isinstance(unknown, StateStoreDown)
    await state.close()


async def test_a_key_file_needs_no_redis(tmp_path) -> None:
    file = tmp_path / "key"
    file.write_text("k" * 32 + "\n")

    async def nobody(proposal: bytes) -> bytes:
        raise AssertionError("it was asked")

    link = await Links(nobody, str(file), 60.0).link(PATH)
    assert await Links(nobody, str(file), 60.0).is_signed(PATH, query_of(link))
    file.write_text("l" * 32)
    with pytest.raises(LinkRefused):
        await Links(nobody, str(file), 60.0).is_signed(PATH, query_of(link))


@pytest.mark.parametrize(("text", "message"), [("short", "32 at least"), (None, "cannot be read")])
def test_a_bad_key_file_stops_the_start(tmp_path, text: str | None, message: str) -> None:
    file = tmp_path / "key"
    if text is not None:
        file.write_text(text)
    with pytest.raises(StartupError, match=message):
        Links(State.shared_key, str(file), 60.0)


def test_links_must_hold_for_some_time() -> None:
    with pytest.raises(StartupError, match="link_s"):
        Links(State.shared_key, "", 0.0)
