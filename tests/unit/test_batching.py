"""The stride scheduler: what a key has used counts, whether its requests are under way or not."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from dit_svc.batching import StrideScheduler


@dataclass(eq=False)
class Request:
    key: str
    cost: float
    batch: list[Request] | None = None


def choose(scheduler: StrideScheduler, requests: Sequence[Request], depth: int = 1) -> list[Request]:
    return scheduler.choose(
        requests,
        lambda request: request.key,
        lambda request: request.cost,
        4,
        under_way=lambda request: request.batch,
        depth=depth,
    )


def beats(scheduler: StrideScheduler, requests: Sequence[Request], depth: int) -> Iterator[list[Request]]:
    """Batches, each of which lands when `depth - 1` more have been chosen after it."""
    pipeline: deque[list[Request]] = deque([[] for _ in range(depth - 1)])
    while True:
        batch = choose(scheduler, requests, depth)
        for request in batch:
            request.batch = batch
        yield batch
        pipeline.append(batch)
        for request in pipeline.popleft():
            request.batch = None


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_costly_request_gets_its_share_of_the_cost_and_no_more_behind_a_pipeline_too(depth):
    requests = [Request("clip", 100.0), *(Request("picture", 1.0) for _ in range(4))]
    steps: Counter[str] = Counter()
    for _, batch in zip(range(400 * depth), beats(StrideScheduler(), requests, depth), strict=False):
        steps.update(request.key for request in batch)
    # One of five requests, so a fifth of the cost: one step of the clip to a hundred of each picture.
    assert steps["clip"] == pytest.approx(steps["picture"] / 400, abs=1), steps


@pytest.mark.parametrize(
    ("requests", "depth", "expected"),
    [(3, 2, [2, 1]), (5, 2, [3, 2]), (7, 4, [2, 2, 2, 1]), (5, 4, [2, 1, 1, 1]), (4, 4, [1] * 4), (9, 2, [4, 4])],
)
def test_no_request_is_left_idle_behind_a_pipeline(requests: int, depth: int, expected: list[int]) -> None:
    running = beats(StrideScheduler(), [Request("picture", 1.0) for _ in range(requests)], depth)
    assert [len(next(running)) for _ in range(3 * depth)] == expected * 3


def test_a_key_that_filled_the_gaps_of_others_is_not_made_to_wait_for_it():
    requests, scheduler = [Request("clip", 100.0), Request("picture", 1.0)], StrideScheduler()
    running = beats(scheduler, requests, 2)
    # Each request alone cannot keep two ranks busy: they take turns, whatever they cost.
    assert [next(running)[0].key for _ in range(200)] == ["clip", "picture"] * 100
    requests.append(Request("picture", 1.0))
    # Of two pictures one is ready at any time. What the clip owes is its last step.
    assert "clip" in [next(running)[0].key for _ in range(220)]


def test_a_key_without_requests_is_forgotten():
    scheduler, clip, picture = StrideScheduler(), Request("clip", 100.0), Request("picture", 1.0)
    assert choose(scheduler, [clip, picture]) == [clip]
    assert choose(scheduler, [picture]) == [picture]
    assert choose(scheduler, [picture, clip]) == [clip], "it starts at the present, without what it owed"
