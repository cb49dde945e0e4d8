"""How the gateway's process ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.__main__ import serve
from gateway.config import GatewayConfig
from gateway.dispatch import Dispatcher
from services.config import parse


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
