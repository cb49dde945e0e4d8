"""Quotas on a real Redis: its clock, both or none, and nothing given back beyond the limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import cast

import pytest

from gateway.config import GatewaySection, RedisSection, StagesSection
from gateway.dispatch import Dispatcher
from gateway.keys import ApiKey
from gateway.links import Links
from gateway.objects import Folder
from gateway.quotas import Quotas
from gateway.replicas import Replicas
from gateway.requests import RequestService
from gateway.state import State
from gateway.store import Store
from services.errors import NotReady, QuotaExceeded
from services.request import GenerationParams, Limits
from tests.cluster.redis_process import RedisProcess, redis_process


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with redis_process(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
async def quotas(server: RedisProcess) -> AsyncIterator[Quotas]:
    state = State(RedisSection(url=f"redis://127.0.0.1:{server.port}"), "gateway")
    server.admin().flushall()
    yield Quotas(state)
    await state.close()


def key(**limits: float) -> ApiKey:
    return ApiKey(id="k", name="k", tenant="t", scopes=("generate",), sha256="", **limits)


async def test_a_quota_refills_evenly(quotas: Quotas) -> None:
    # Twenty a second.
    fast = key(requests_per_minute=1200)
    for _ in range(1200):
        await quotas.take(fast, 1)
    with pytest.raises(QuotaExceeded) as error:
        while True:
            await quotas.take(fast, 1)
    assert 0 < error.value.retry_after_s <= 0.06
    await asyncio.sleep(error.value.retry_after_s)
    await quotas.take(fast, 1)


class Leaving(Replicas):
    """A denoiser that is there when its limits are asked for, and away right after."""

    def limits(self, model: str) -> Limits:
        return Limits()

    def component(self, stage: str, model: str) -> str:
        raise NotReady(f"no {stage} of {model} is here")


async def test_a_request_that_finds_no_replica_costs_nothing(quotas: Quotas, tmp_path: Path) -> None:
    replicas, links = Leaving(StagesSection(), lambda: None), Links(quotas.state.shared_key, "", 60.0)
    parts = cast(Dispatcher, None), replicas, Store(Folder(tmp_path)), links
    service = RequestService(quotas.state, *parts, GatewaySection(), {})
    one = key(requests_per_minute=1)
    with pytest.raises(NotReady):
        await service.submit(GenerationParams(prompt="p", model="m"), one)
    await quotas.take(one, 1)
    with pytest.raises(QuotaExceeded):
        await quotas.take(one, 1)


async def test_both_quotas_are_taken_or_none(quotas: Quotas) -> None:
    both = key(requests_per_minute=2, cost_per_hour=10)
    await quotas.take(both, 9)
    for _ in range(5):
        with pytest.raises(QuotaExceeded, match="10 megapixel-steps an hour, and this request costs 9"):
            await quotas.take(both, 9)
    await quotas.take(both, 0.5)
    with pytest.raises(QuotaExceeded, match="2 requests a minute"):
        await quotas.take(both, 0.1)


async def test_what_is_given_back_is_never_more_than_the_limit(quotas: Quotas, server: RedisProcess) -> None:
    some = key(requests_per_minute=1, cost_per_hour=5)
    for _ in range(3):
        await quotas.take(some, 5)
        await quotas.give_back(some, 5)
    await quotas.give_back(some, 5)
    await quotas.take(some, 5)
    with pytest.raises(QuotaExceeded):
        await quotas.take(some, 0.1)
    assert 3500 < server.admin().ttl("{ll}:quota:k") <= 3600


async def test_many_at_once_get_no_more_than_there_is(quotas: Quotas) -> None:
    ten = key(cost_per_hour=10)
    taken = await asyncio.gather(*(quotas.take(ten, 1) for _ in range(40)), return_exceptions=True)
    assert [outcome is None for outcome in taken].count(True) == 10


async def test_without_quotas_redis_is_not_asked(quotas: Quotas, server: RedisProcess) -> None:
    await quotas.take(key(), 1e9)
    assert not server.admin().keys()
