"""Followers that join while events are on their way to others."""

from __future__ import annotations

import asyncio

import pytest

from gateway.followers import Follower, Followers, StoredEvent


def events(first: int, last: int) -> list[StoredEvent]:
    return [StoredEvent(f"{number}-0", "step", "", b"", {}) for number in range(first, last + 1)]


def taken(follower: Follower) -> list[str]:
    return [event.event_id for event in follower.take()]


def test_who_joins_while_a_change_is_under_way_misses_nothing() -> None:
    followers = Followers()
    with followers.joined("r", "100-0") as early:
        after = followers.seen_by_all("r")
        with followers.joined("r", "0") as late:
            # Its own reading is under way.
            late.behind = False
            followers.give("r", after, events(101, 102))
            assert taken(early) == ["101-0", "102-0"]
            assert taken(late) == [] and late.behind
            late.give(events(1, 101))
            late.give(events(101, 102))
            assert taken(late) == [f"{number}-0" for number in range(1, 103)]


def test_who_joins_after_nobody_followed_is_woken() -> None:
    followers = Followers()
    after = followers.seen_by_all("r")
    with followers.joined("r", "0") as late:
        late.behind = False
        followers.give("r", after, [])
        assert late.behind


def test_who_has_seen_more_takes_what_is_new() -> None:
    followers = Followers()
    with followers.joined("r", "5-0") as ahead:
        ahead.behind = False
        followers.give("r", "3-0", events(4, 7))
        assert taken(ahead) == ["6-0", "7-0"] and not ahead.behind


@pytest.mark.parametrize("steps", range(4))
async def test_a_client_that_leaves_as_an_event_comes_is_gone(steps: int) -> None:
    follower = Follower("0")

    async def follow() -> None:
        while True:
            await follower.wait(10)

    following = asyncio.create_task(follow())
    await asyncio.sleep(0.01)
    follower.wake()
    for _ in range(steps):
        await asyncio.sleep(0)
    following.cancel()
    done, _ = await asyncio.wait({following}, timeout=5)
    assert done
