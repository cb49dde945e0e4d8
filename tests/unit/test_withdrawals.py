"""What is withdrawn when Redis answers again."""

from __future__ import annotations

import asyncio

import pytest

from gateway.withdrawals import Withdrawals
from services.errors import StateStoreDown


async def test_one_task_withdraws_all_that_fit_once_redis_answers(caplog: pytest.LogCaptureFixture) -> None:
    answers = asyncio.Event()
    withdrawn: list[str] = []

    async def withdraw(request_id: str) -> None:
        if not answers.is_set():
            raise StateStoreDown("away")
        withdrawn.append(request_id)

    withdrawals = Withdrawals(withdraw, max_waiting=3)
    tasks = len(asyncio.all_tasks())
    for number in range(5):
        withdrawals.add(f"r{number}")
    await asyncio.sleep(0.15)
    assert len(asyncio.all_tasks()) == tasks + 1 and not withdrawn
    assert "r4 may run for nobody" in caplog.text
    answers.set()
    async with asyncio.timeout(5):
        while len(asyncio.all_tasks()) > tasks:
            await asyncio.sleep(0.01)
    assert withdrawn == ["r0", "r1", "r2"]
    withdrawals.add("later")
    await asyncio.sleep(0.01)
    assert withdrawn[-1] == "later"
