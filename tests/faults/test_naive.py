"""The checker can fail: designs without fences, put in by the harness, are found out by the same scenario."""

from __future__ import annotations

import pytest

from tests.faults.checker import check
from tests.faults.cluster import FaultCluster
from tests.faults.run import Run
from tests.faults.scenarios.deaths import aborted_behind_a_frozen_owner, frozen_gateway

# One denoiser with room: the calls of the zombie and of the new owner meet there.
REPLICAS = {"text_encoder": 1, "dit": 1, "vae": 1}
# So many share it that the zombie's calls still make steps when the new owner's begin, after a lease and a bit: with
# 60 steps of 20 ms each they would need 6 s.
REQUESTS = 5


@pytest.fixture(scope="module")
def naive_gateways(here, tmp_path_factory):
    modules = {f"gateway-{index}": "tests.faults.naive_gateway" for index in range(2)}
    with FaultCluster(tmp_path_factory.mktemp("gateways"), REPLICAS, max_in_flight=64, modules=modules) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def naive_fronts(here, tmp_path_factory):
    modules = {name: "tests.faults.naive_stage" for name in ("dit-0", "vae-0")}
    with FaultCluster(tmp_path_factory.mktemp("fronts"), REPLICAS, max_in_flight=64, modules=modules) as cluster:
        yield cluster


async def _found_behind_a_frozen_gateway(cluster: FaultCluster) -> set[str]:
    async with Run(cluster, "naive", 1) as run:
        history = await frozen_gateway(run, requests=REQUESTS, owned_at_least=REQUESTS, gateway=0)
    return {violation.invariant for violation in check(history)}


async def test_a_commit_that_compares_no_fences_is_found_out(naive_gateways):
    """Whatever wakes the zombie up, its beat or a call that has ended, it ends the request: each way is a commit."""
    assert await _found_behind_a_frozen_gateway(naive_gateways) & {"I1", "I2", "I4"}


async def test_a_front_that_lets_every_owner_in_is_found_out(naive_fronts):
    assert "I3" in await _found_behind_a_frozen_gateway(naive_fronts)


async def test_a_denoiser_that_hears_of_no_loss_is_found_out(naive_fronts):
    async with Run(naive_fronts, "deaf", 1) as run:
        history = await aborted_behind_a_frozen_owner(run, requests=4)
    assert {violation.invariant for violation in check(history)} == {"I6"}
