"""What a failover that loses writes may cost, on a primary and a replica that are real."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import RedisSection
from gateway.records import queue_key
from gateway.state import State
from gateway.ticket import Ticket
from services.errors import StateStoreDown
from tests.cluster.redis_process import redis_process
from tests.cluster.running import wait_for

DIT = queue_key("dit", "d")
FIELDS = {"params": b"", "traceparent": ""}
LEASE_S = 60.0


async def test_fences_that_a_failover_has_lost_are_never_given_again(tmp_path: Path) -> None:
    # Else it waits 5 s for more replicas than the one.
    at_once = "repl-diskless-sync-delay 0"
    with (
        redis_process(tmp_path / "old", at_once) as old,
        redis_process(tmp_path / "new", f"replicaof 127.0.0.1 {old.port}") as new,
    ):
        one, other = (State(RedisSection(url=f"redis://127.0.0.1:{port}"), "one") for port in (old.port, new.port))
        wait_for(lambda: new.admin().info("replication")["master_link_status"] == "up", 20)
        await one.submit("r", DIT, Ticket(), FIELDS)
        assert old.admin().wait(1, 5000) == 1
        # Nothing from here on reaches the replica before it becomes the primary.
        new.admin().replicaof("NO", "ONE")
        lost = await one.claim((DIT,), LEASE_S)
        await one.requeue("r", lost.fence, 3, False, b"")
        newest = await one.claim((DIT,), LEASE_S)
        assert lost.fence < newest.fence
        claim = await other.claim((DIT,), LEASE_S)
        assert claim.request_id == "r" and claim.fence > newest.fence
        for late in (lost, newest):
            assert await other.commit(late, "done", "", "", {"file": "late"}) == "lost"
        assert await other.commit(claim, "done", "", "", {"file": "ours"}) == "done"
        for state in (one, other):
            await state.close()


async def test_fences_rise_when_the_clock_goes_back(tmp_path: Path) -> None:
    with redis_process(tmp_path) as server:
        state = State(RedisSection(url=f"redis://127.0.0.1:{server.port}"), "one")
        ahead = 2 * 10**15
        server.admin().set("{ll}:fence", ahead)
        for number in (1, 2):
            await state.submit(f"r{number}", DIT, Ticket(), FIELDS)
            assert (await state.claim((DIT,), LEASE_S)).fence == ahead + number
        await state.close()


async def test_a_primary_without_the_replicas_that_it_must_have_takes_nothing(tmp_path: Path) -> None:
    with redis_process(tmp_path, "min-replicas-to-write 1") as server:
        state = State(RedisSection(url=f"redis://127.0.0.1:{server.port}"), "one")
        with pytest.raises(StateStoreDown, match="refuses commands"):
            await state.submit("r", DIT, Ticket(), FIELDS)
        await state.close()
