"""Calls to a real Redis whose caller is cancelled meanwhile."""

from __future__ import annotations

import asyncio

from gateway.config import RedisSection
from gateway.scripts import Scripts

# More than a call takes with a connection that is open.
LOOP_TURNS = 16


async def test_a_cancelled_call_ends_cancelled_whenever_it_was_told(url: str) -> None:
    scripts = Scripts(RedisSection(url=url))
    await scripts.redis.ping()
    ended_otherwise = []
    for turns in range(LOOP_TURNS):
        asking = asyncio.create_task(scripts.call(scripts.redis.ping))
        for _ in range(turns):
            await asyncio.sleep(0)
        told = asking.cancel()
        await asyncio.wait({asking}, timeout=5)
        if told and not asking.cancelled():
            ended_otherwise.append(turns)
    await scripts.close()
    assert not ended_otherwise
