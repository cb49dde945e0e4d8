"""A gateway that commits without looking at fence and state: what the checker must find out."""

from __future__ import annotations

import gateway.__main__ as real
from gateway.config import RedisSection
from gateway.recorded_state import RecordedState
from gateway.request_log import RequestLog
from services.server import ensure_malloc, run_service

REFUSALS = ("return {'lost'", "return {'running'")


class NaiveState(RecordedState):
    """Its commits are plain writes."""

    def __init__(self, redis: RedisSection, owner: str, requests: RequestLog) -> None:
        super().__init__(redis, owner, requests)
        lines = str(self._scripts.by_name["commit"].script).splitlines(keepends=True)
        for refusal in REFUSALS:
            kept = [line for line in lines if refusal not in line]
            if len(kept) == len(lines):
                raise AssertionError(f"the commit script has no {refusal!r} that could be taken out")
            lines = kept
        self._scripts.by_name["commit"] = self._scripts.redis.register_script("".join(lines))


if __name__ == "__main__":
    ensure_malloc()
    real.RecordedState = NaiveState  # type: ignore[misc]
    run_service(real.main)
