"""The pool itself."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection

import pytest

from tests.parallel import pool as pool_module
from tests.parallel.pool import RankPool


def serve(rank: int, port: int, end: Connection) -> None:
    """Ranks that need no torch: rank 1 hangs or dies when it is told to."""
    while True:
        _, name, _, _ = end.recv()
        if rank == 1 and name == "hang":
            time.sleep(600)
        if rank == 1 and name == "die":
            os._exit(1)
        end.send((True, os.getpid()))


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(pool_module, "_serve", serve)
    pool = RankPool(size=2)
    yield pool
    pool.close()


@pytest.mark.parametrize("name", ["hang", "die"])
def test_a_rank_that_is_lost_costs_one_call_and_all_start_anew(two, name, monkeypatch) -> None:
    before = two.run("work", 2)
    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "TIMEOUT_S", 4.0)
        with pytest.raises(AssertionError, match=f"rank 1:\nit died, or did not answer {name} within 4 s") as failed:
            two.run(name, 2)
    assert "rank 0" not in str(failed.value)
    after = two.run("work", 2)
    assert len({*before, *after}) == 4
