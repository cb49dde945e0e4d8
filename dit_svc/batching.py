"""Which requests share the next step: stride scheduling over batch keys.

Every key (shape, expert, ...) has a virtual time that grows by what its batches cost for each request in them; the key
that is furthest behind goes next. So resolutions interleave by cost, and nothing waits behind the head of a queue.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")


class StrideScheduler:
    """Chooses batches. Keys without requests are forgotten."""

    def __init__(self) -> None:
        self._passed: dict[Hashable, float] = {}
        self._now = 0.0

    def choose(
        self, requests: Sequence[T], key_of: Callable[[T], Hashable], cost_of: Callable[[T], float], most: int
    ) -> list[T]:
        """At most `most` requests of one key; those that come first in `requests` are preferred.

        Args:
            cost_of: of one step of a request, in any unit > 0.
        """
        if not requests:
            return []
        groups: dict[Hashable, list[T]] = {}
        for request in requests:
            groups.setdefault(key_of(request), []).append(request)
        # A key that is new starts at the present: it neither waits nor catches up on time when it did not exist.
        self._passed = {key: max(self._passed.get(key, self._now), self._now - 1e12) for key in groups}
        key = min(self._passed, key=lambda candidate: self._passed[candidate])
        self._now = self._passed[key]
        batch = groups[key][:most]
        # Large groups earn as many turns as their requests deserve.
        self._passed[key] += cost_of(batch[0]) * len(batch) / len(groups[key])
        return batch
