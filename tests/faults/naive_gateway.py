"""A gateway that commits without looking at fence and state: what the checker must find out."""

from __future__ import annotations

import gateway.__main__ as real
from gateway.config import RedisSection
from gateway.recorded_state import RecordedState
from gateway.request_log import RequestLog
from services.server import ensure_malloc, run_service

REFUSAL = "return {'lost'"


class NaiveState(RecordedState):
    """Its commits are plain writes."""

    def __init__(self, redis: RedisSection, owner: str, requests: RequestLog) -> None:
        super().__init__(redis, owner, requests)
        lines = str(self._scripts.by_name["commit"].script).splitlines(keepends=True)
        kept = [line for line in lines if REFUSAL not in line]
        if len(kept) == len(lines):
            raise AssertionError("the commit script refuses nothing that could be taken out")
        self._scripts.by_name["commit"] = self._scripts.redis.register_script("".join(kept))


if __name__ == "__main__":
    ensure_malloc()
    real.RecordedState = NaiveState  # type: ignore[misc]
    run_service(real.main)
