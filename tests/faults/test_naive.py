"""The checker can fail: designs without fences, put in by the harness, are found out by the same scenario."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.checker import check
from tests.faults.cluster import FaultCluster
from tests.faults.run import Run
from tests.faults.scenarios.deaths import aborted_behind_a_frozen_owner, frozen_gateway

# One denoiser with room: the calls of the zombie and of the new owner meet there.
REPLICAS = {"text_encoder": 1, "dit": 1, "vae": 1}
NAIVE = {
    "commit": {f"gateway-{index}": "tests.faults.naive_gateway" for index in range(2)},
    "front": {name: "tests.faults.naive_stage" for name in ("dit-0", "vae-0")},
}
ATTEMPTS = 5
FOUND = {"commit": {"I1", "I2", "I4"}, "front": {"I3"}}


@pytest.mark.parametrize("design", NAIVE)
async def test_a_design_without_fences_is_found_out(tmp_path, monkeypatch, design):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.delenv("REDIS_URL", raising=False)
    # The zombie's own beat may stop it before it does harm; it does not every time.
    for attempt in range(ATTEMPTS):
        with FaultCluster(tmp_path / str(attempt), REPLICAS, max_in_flight=64, modules=NAIVE[design]) as cluster:
            async with Run(cluster, "naive", attempt) as run:
                history = await frozen_gateway(run, requests=16, owned_at_least=6, gateway=0)
        if {violation.invariant for violation in check(history)} & FOUND[design]:
            return
    pytest.fail(f"{ATTEMPTS} runs without fences, and the checker found nothing")


async def test_a_denoiser_that_hears_of_no_loss_is_found_out(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.delenv("REDIS_URL", raising=False)
    with FaultCluster(tmp_path, REPLICAS, modules=NAIVE["front"]) as cluster:
        async with Run(cluster, "naive", 1) as run:
            history = await aborted_behind_a_frozen_owner(run, requests=4)
    assert {violation.invariant for violation in check(history)} == {"I6"}
