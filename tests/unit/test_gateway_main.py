"""How the gateway's process ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.__main__ import serve
from gateway.config import GatewayConfig, RedisSection, redis_url
from gateway.dispatch import Dispatcher
from services.config import parse
from services.errors import StartupError


async def test_a_loop_that_breaks_ends_the_gateway_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_dispatcher: Dispatcher) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Dispatcher, "run", broken)
    table = {
        "gateway": {"http_port": 0, "grpc_port": 0},
        "redis": {"url": "redis://127.0.0.1:1/0"},
        "store": {"path": str(tmp_path)},
        "stages": {stage: "static:127.0.0.1:1" for stage in ("text_encoder", "dit", "vae")},
    }
    with pytest.raises(RuntimeError, match="broken"):
        await serve(parse(GatewayConfig, table))


def test_the_url_of_redis_may_be_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "url"
    with pytest.raises(StartupError, match="url_file .* cannot be read"):
        redis_url(RedisSection(url_file=str(file)))
    file.write_text("\n")
    with pytest.raises(StartupError, match="is empty: write the URL into it"):
        redis_url(RedisSection(url_file=str(file)))
    file.write_text("redis://:secret@r:6379/0\n")
    assert redis_url(RedisSection(url_file=str(file))) == "redis://:secret@r:6379/0"
    assert redis_url(RedisSection(url="redis://r:6379/0")) == "redis://r:6379/0"


def test_a_public_url_without_a_scheme_is_refused() -> None:
    with pytest.raises(StartupError, match=r"gateway.public_url is 'pictures.example': write it as https://HOST"):
        parse(GatewayConfig, {"gateway": {"public_url": "pictures.example"}})
