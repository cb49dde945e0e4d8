"""Two gateways share one denoiser of few slots: it is full all the time, and never has to refuse."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import httpx

from tests.cluster.gateway_process import gateway
from tests.cluster.redis_process import own_redis
from tests.cluster.running import wait_for
from tests.cluster.sleeping import Stages, addresses_of, sleeping_stages

SLOTS, REQUESTS, STEPS = 4, 40, 3


def denoise_calls(metrics_port: int) -> dict[str, int]:
    """Calls that have ended, by outcome."""
    lines = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5).text.splitlines()
    counted = [line for line in lines if line.startswith('lightloom_calls_total{method="Denoise",outcome="')]
    return {line.split('"')[3]: int(float(line.rsplit(" ", 1)[1])) for line in counted}


def test_gateways_that_share_a_replica_do_not_overbook_it(tmp_path: Path, sleeping: Stages) -> None:
    with ExitStack() as stack:
        redis_url = stack.enter_context(own_redis(tmp_path))
        stages = stack.enter_context(sleeping_stages(tmp_path, {"dit": SLOTS}))
        addresses = addresses_of({**sleeping, **stages})
        folders = [tmp_path / "one", tmp_path / "two"]
        for folder in folders:
            folder.mkdir()
        gateways = [stack.enter_context(gateway(folder, redis_url, addresses)) for folder in folders]
        body = {"prompt": "a red circle", "width": 64, "height": 64, "steps": STEPS}
        for number in range(REQUESTS):
            assert gateways[number % 2].rest.post("/v1/requests", json=body).status_code == 202
        done = wait_for(lambda: ended(gateways[0].rest), 120, 0.2)
        assert done == ["done"] * REQUESTS
        calls = denoise_calls(stages["dit"]["metrics_port"])
        assert calls == {"ok": REQUESTS}


def ended(rest: httpx.Client) -> list[str]:
    """The states of all requests, once none waits or runs."""
    states = [status["state"] for status in rest.get("/v1/requests", params={"limit": 1000}).json()["data"]]
    return [] if {"queued", "running"} & set(states) else states
