"""The fault suite in its short form. Each scenario ends with the checker: invariants I1 to I8 of `checker.py`.

Times are bounds for a loaded machine; `python -m tests.faults.soak` measures them.
"""

from __future__ import annotations

from tests.faults.checker import check
from tests.faults.rank import POISON
from tests.faults.run import Run
from tests.faults.scenarios import deaths, load, network

# HTTP/2 pings after 10 s of silence, given up 5 s later.
FOUND_S = 15.0
LOADED_S = 8.0


async def test_f1_killed_workers(cluster, reference):
    async with Run(cluster, "f1", 1) as run:
        history = await deaths.killed_workers(run, requests=20, kills=5)
    assert check(history, reference=reference) == []
    assert run.measured["requeued_s_count"] >= 3
    assert run.measured["requeued_s_max"] < LOADED_S


async def test_f3_gateways_die_before_a_checkpoint_is_noted(cluster, reference):
    async with Run(cluster, "f3", 1) as run:
        history = await deaths.killed_before_the_note(run, requests=8)
    assert check(history, reference=reference) == []
    assert run.measured["unknown_checkpoints"] >= 1


async def test_f4_a_frozen_gateway_comes_back_as_a_zombie(cluster, reference):
    async with Run(cluster, "f4", 1) as run:
        history = await deaths.frozen_gateway(run, requests=12)
    assert check(history, reference=reference) == []
    assert run.measured["adopted_s_count"] >= 1
    assert run.measured["adopted_s_max"] < cluster.lease_s + LOADED_S


async def test_f4_and_f10_an_abort_while_the_owner_is_frozen(cluster):
    async with Run(cluster, "f4-abort", 1) as run:
        history = await deaths.aborted_behind_a_frozen_owner(run, requests=9)
    assert check(history) == []
    assert {request["state"] for request in history.final["requests"].values()} == {"cancelled"}


async def test_f5_a_killed_gateway(cluster, reference):
    async with Run(cluster, "f5", 1) as run:
        history = await deaths.killed_gateway(run, requests=16)
    assert check(history, reference=reference) == []
    assert run.measured["adopted_s_count"] >= 1
    assert run.measured["adopted_s_max"] < cluster.lease_s + LOADED_S


async def test_f6_killed_redis(cluster, reference):
    async with Run(cluster, "f6", 1) as run:
        history = await deaths.killed_redis(run, requests=20, kills=2, away_s=3.0)
    assert check(history, reference=reference) == []
    assert run.measured["refused_s_max"] < 2.0 + LOADED_S


async def test_f7_a_sentinel_failover(sentinel_cluster, reference):
    async with Run(sentinel_cluster, "f7", 1) as run:
        history = await deaths.failed_over_redis(run, requests=16)
    assert check(history, reference=reference, may_be_lost=True) == []
    assert run.measured["writes_back_s"] < 5.0 + LOADED_S


async def test_f8_and_f4_silent_workers(cluster, reference):
    async with Run(cluster, "f8", 1) as run:
        history = await network.silent_workers(run, requests=9)
    assert check(history, reference=reference) == []
    for kind in ("cut", "frozen"):
        assert run.measured[f"{kind}_found_s_count"] >= 1
        assert run.measured[f"{kind}_found_s_max"] < FOUND_S + LOADED_S


async def test_f9_a_bad_line_to_the_vae(cluster, reference):
    async with Run(cluster, "f9", 1) as run:
        history = await network.bad_line_to_the_vae(run, pictures=2, bytes_per_s=8e6, crowd=8)
    assert check(history, reference=reference) == []
    assert run.measured["transfers_repeated"] >= 2
    assert run.measured["gateway_growth_mib"] < 64


async def test_f10_an_abort_storm(cluster, reference):
    async with Run(cluster, "f10", 1) as run:
        history = await load.abort_storm(run, requests=200, within_s=5.0)
    assert check(history, reference=reference) == []
    assert run.measured["queued_abort_s_count"] >= 10
    assert run.measured["queued_abort_s_max"] < LOADED_S
    assert run.measured["running_abort_s_count"] >= 3
    assert run.measured["done"] + run.measured["cancelled"] == 200


async def test_f11_a_flood(cluster, reference):
    async with Run(cluster, "f11", 1) as run:
        history = await load.flood(run, submits=400)
    assert check(history, reference=reference) == []
    assert run.measured["refused"] > 0
    assert run.measured["gateway_growth_mib"] < 64


async def test_f12_a_rolling_restart(cluster, reference):
    async with Run(cluster, "f12", 1) as run:
        history = await deaths.rolling_restart(run, clients=4, waiting=4)
    assert check(history, reference=reference) == []
    assert [line for line in history.clients if line["kind"] == "fail"] == []


async def test_f12_poison_takes_nobody_along(poisoned_cluster, reference):
    async with Run(poisoned_cluster, "poison", 1) as run:
        history = await deaths.poison(run, others=6)
    assert check(history, reference=reference, may_fail={POISON}) == []
    states = {request["state"] for request in history.final["requests"].values()}
    assert states == {"done", "failed"}
    assert run.measured["attempts_of_poison"] == 3
    assert run.measured["attempts_of_others"] >= 2
