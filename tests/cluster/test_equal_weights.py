"""Two models with equal weights share their denoisers, and one that lacks an encoder must not stop the other."""

from __future__ import annotations

import time
from contextlib import ExitStack

from tests.cluster.gateway_process import gateway
from tests.cluster.running import wait_for
from tests.cluster.sleeping import ready, sleeping_cluster, sleeping_stage

BODY = {"prompt": "a red circle", "width": 64, "height": 64, "steps": 2}
# 0.1 s on an idle machine; a denoiser that is blamed stands still for up to 4 s.
SOON_S = 3.0


def test_a_model_whose_encoder_is_away_does_not_stop_its_twin(sleeping, tmp_path):
    with ExitStack() as stack, ExitStack() as encoder:
        twin = {
            stage: place.enter_context(sleeping_stage(tmp_path, stage, 64, model="twin"))
            for stage, place in (("text_encoder", encoder), ("dit", stack), ("vae", stack))
        }
        wait_for(lambda: all(ready(service["metrics_port"]) for service in twin.values()), 60)
        cluster = stack.enter_context(sleeping_cluster(tmp_path, sleeping))
        addresses = {
            stage: f"{address},127.0.0.1:{twin[stage]['port']}" for stage, address in cluster.addresses.items()
        }
        running = stack.enter_context(gateway(tmp_path / "gateway", cluster.redis_url, addresses))
        rest = running.rest
        wait_for(lambda: rest.get("/health").json()["models"] == {"sleeping": True, "twin": True})
        encoder.close()
        wait_for(lambda: rest.get("/health").json()["models"] == {"sleeping": True, "twin": False})
        waiting = [rest.post("/v1/requests", json={**BODY, "model": "twin"}).json()["id"] for _ in range(3)]
        took_s = []
        for number in range(6):
            started_s = time.monotonic()
            wish = {"prompt": f"a red circle {number}", "model": "sleeping", "size": "64x64", "steps": 2}
            made = rest.post("/v1/images/generations", json=wish)
            took_s.append(time.monotonic() - started_s)
            assert made.status_code == 200, made.text
        assert max(took_s) < SOON_S, took_s
        for request_id in waiting:
            record = rest.get(f"/v1/requests/{request_id}").json()
            assert (record["state"], record["queued_s"]) == ("queued", 0), "it has been claimed and given back"
        port = twin["text_encoder"]["port"]
        stack.enter_context(sleeping_stage(tmp_path, "text_encoder", 64, model="twin", port=port))
        for request_id in waiting:
            wait_for(lambda one=request_id: rest.get(f"/v1/requests/{one}").json()["state"] == "done", 60)
