"""Which requests share the next step: stride scheduling over batch keys.

Every key (shape, expert, ...) has a virtual time that grows by what its batches cost for each request in them; the key
that is furthest behind goes next. So resolutions interleave by cost, and nothing waits behind the head of a queue.
Behind a pipeline, requests whose step is under way count too: their key does not forget what it has used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")


class StrideScheduler:
    """Chooses batches. Keys without requests are forgotten."""

    def __init__(self) -> None:
        self._passed: dict[Hashable, float] = {}
        self._now = 0.0

    def choose(
        self,
        requests: Sequence[T],
        key_of: Callable[[T], Hashable],
        cost_of: Callable[[T], float],
        most: int,
        *,
        under_way: Callable[[T], object | None],
        depth: int,
    ) -> list[T]:
        """At most `most` requests of one key; those that come first in `requests` are preferred.

        Args:
            requests: all there are.
            cost_of: of one step of a request, in any unit > 0.
            under_way: the batch with which a request makes a step already, so that it cannot be chosen; or None.
            depth: batches that are to be under way at once.
        """
        groups: dict[Hashable, list[T]] = {}
        for request in requests:
            groups.setdefault(key_of(request), []).append(request)
        # A key that is new, or for a time had no request to choose, starts at the present: it does not catch up.
        self._passed = {key: max(self._passed.get(key, self._now), self._now) for key in groups}
        idle = {key: [request for request in group if under_way(request) is None] for key, group in groups.items()}
        choices = [key for key in groups if idle[key]]
        if not choices:
            return []
        key = min(choices, key=lambda choice: self._passed[choice])
        self._now = self._passed[key]
        # Equal shares for this batch and those behind: none is left idle, and a costly key does not go only because no
        # other is left.
        batches = {id(batch) for request in groups[key] if (batch := under_way(request)) is not None}
        batch = idle[key][: min(most, math.ceil(len(idle[key]) / max(1, depth - len(batches))))]
        # Large groups earn as many turns as their requests deserve.
        self._passed[key] += cost_of(batch[0]) * len(batch) / len(groups[key])
        return batch
