"""Two models with equal weights share their denoisers, and one that lacks an encoder must not stop the other."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from tests.cluster.running import serving, wait_for

SOURCE = Path(__file__).parents[2] / "demo/checkpoints/qwen_image"
BODY = {"prompt": "a red circle", "steps": 2}
# 0.3 s on an idle machine; a denoiser that is blamed stands still for up to 4 s.
SOON_S = 3.0


@pytest.fixture(scope="module")
def twins(tmp_path_factory, monkeypatch_session):
    model = {"source": str(SOURCE), "limits": {"default_width": 128, "default_height": 128, "default_steps": 2}}
    with serving(tmp_path_factory.mktemp("cluster"), {"models": {"a": model, "b": model}}) as running:
        yield running


def test_a_model_whose_encoder_is_away_does_not_stop_its_twin(twins):
    with httpx.Client(base_url=twins.base_url, timeout=60) as rest:
        twins.run(twins.cluster.scale("b", "text_encoder", 0))
        waiting = [rest.post("/v1/requests", json={**BODY, "model": "b"}).json()["id"] for _ in range(3)]
        took_s = []
        for number in range(6):
            started_s = time.monotonic()
            made = rest.post("/v1/images/generations", json={**BODY, "model": "a", "prompt": f"a red circle {number}"})
            took_s.append(time.monotonic() - started_s)
            assert made.status_code == 200, made.text
        assert max(took_s) < SOON_S, took_s
        for request_id in waiting:
            record = rest.get(f"/v1/requests/{request_id}").json()
            assert (record["state"], record["queued_s"]) == ("queued", 0), "it has been claimed and given back"
        twins.run(twins.cluster.scale("b", "text_encoder", 1))
        for request_id in waiting:
            wait_for(lambda one=request_id: rest.get(f"/v1/requests/{one}").json()["state"] == "done", 60)
