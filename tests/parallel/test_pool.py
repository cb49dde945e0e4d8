"""The pool itself."""

from __future__ import annotations

import multiprocessing

from tests.parallel import pool as pool_module
from tests.parallel.pool import RankPool


def test_a_late_answer_is_not_taken_for_the_next_jobs(monkeypatch) -> None:
    monkeypatch.setattr(pool_module, "TIMEOUT_S", 0.05)
    pool = RankPool(size=0)
    ours, theirs = multiprocessing.Pipe()
    pool._calls = 1
    assert pool._answer("slow", ours) == (False, "no answer to slow within 0 s")
    pool._calls = 2
    theirs.send((1, True, "late"))
    theirs.send((2, True, "own"))
    assert pool._answer("next", ours) == (True, "own")
    pool.close()
