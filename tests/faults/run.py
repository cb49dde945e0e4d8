"""One run of a scenario: the cluster it happens to, its clients, its random numbers and its records."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType

import psutil
import redis

from gateway.records import PREFIX
from tests.faults.checker import pictures
from tests.faults.clients import Clients, Recipe
from tests.faults.cluster import FaultCluster
from tests.faults.final_state import collect, leftovers, settled, sweep
from tests.faults.history import History, Line, Recorder, read_lines
from tests.faults.waiting import WaitingClients

SETTLE_S = 60.0
SAMPLE_S = 0.1
SHORT = tuple(Recipe(f"a short {number}", seed=number, steps=10) for number in range(4))
LONG = tuple(Recipe(f"a long {number}", seed=number, steps=60) for number in range(4))
LARGE = Recipe("a large one", seed=9, steps=3, side_px=1024)
ALL = (*SHORT, *LONG, LARGE)


class Run:
    """Use it as an async context manager; `finish` gives what was recorded."""

    def __init__(self, cluster: FaultCluster, name: str, seed: int) -> None:
        self.cluster = cluster
        self.random = random.Random(f"{name}/{seed}")
        self.measured: dict[str, float] = {}
        self._file = cluster.folder / "clients" / f"{name}-{seed}.jsonl"
        recorder = Recorder(self._file)
        self.clients = Clients(cluster.urls, recorder, f"{cluster.folder}/{name}-{seed}")
        self.waiting = WaitingClients(cluster.urls, cluster.grpc_target, recorder)

    async def __aenter__(self) -> Run:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.clients.__aexit__(kind, error, trace)

    def recipes(self, kinds: Sequence[Recipe], count: int) -> list[Recipe]:
        """So many, by chance."""
        return self.random.choices(kinds, k=count)

    def start(self, recipes: Sequence[Recipe], *, gateway: int | None = None) -> list[asyncio.Task[str]]:
        """A client for each, all at once, spread over the gateways or at one."""
        chosen = [index if gateway is None else gateway for index in range(len(recipes))]
        runs = zip(recipes, chosen, strict=True)
        return [asyncio.create_task(self.clients.run(recipe, gateway=number)) for recipe, number in runs]

    def accepted(self) -> list[str]:
        """Ids of the requests so far."""
        lines = read_lines([self._file]) if self._file.exists() else []
        return [line["id"] for line in lines if line["kind"] == "ok" and line["op"] == "submit"]

    def owners(self) -> dict[str, str]:
        """The gateway that has each of the running requests."""
        records = self._records(self.accepted(), "state", "owner")
        running = {name: owner for name, (state, owner) in records.items() if state == b"running"}
        return {name: owner.decode().partition("/")[0] for name, owner in running.items()}

    def fences(self, ids: Iterable[str]) -> dict[str, int]:
        """The newest fence of each."""
        return {name: int(fence) for name, (fence,) in self._records(ids, "fence").items()}

    def begun(self, replica: str) -> list[Line]:
        """What a stage process's ranks have begun with."""
        lines = read_lines((self.cluster.folder / "records").glob(f"{replica}-*.jsonl"))
        return [line for line in lines if line["kind"] == "begin"]

    def _records(self, ids: Iterable[str], *fields: str) -> dict[str, list[bytes]]:
        with redis.Redis.from_url(self.cluster.redis_url) as store:
            return {name: store.hmget(f"{PREFIX}:req:{name}", *fields) for name in ids}

    async def finish(self) -> History:
        """Waits until nothing is held any more, and reads all records."""
        self.measured["settled_s"] = await settled(self.cluster, SETTLE_S)
        swept = await sweep(self.cluster)
        left = await asyncio.to_thread(leftovers, self.cluster)
        ids = dict.fromkeys(self.accepted())
        final = await asyncio.to_thread(collect, self.cluster.redis_url, self.cluster.store, ids, left, swept)
        return self.cluster.history(self._file, final)

    @asynccontextmanager
    async def gateway_growth(self) -> AsyncIterator[None]:
        """Measures by how much the gateways grow during the block, at their peak, in MiB."""
        gateways = [process.pid for process in self.cluster.of("gateway")]
        before = [_resident(pid) for pid in gateways]
        peak = list(before)

        async def sample() -> None:
            while True:
                for index, pid in enumerate(gateways):
                    peak[index] = max(peak[index], _resident(pid))
                await asyncio.sleep(SAMPLE_S)

        task = asyncio.create_task(sample())
        try:
            yield
        finally:
            task.cancel()
            growth = [after - first for first, after in zip(before, peak, strict=True)]
            self.measured["gateway_growth_mib"] = max(growth) / 2**20


def _resident(pid: int) -> int:
    with suppress(psutil.NoSuchProcess):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


async def reference_of(cluster: FaultCluster) -> dict[str, str]:
    """The sha256 of every recipe, made without a fault."""
    async with Run(cluster, "reference", 0) as run:
        states = await asyncio.gather(*run.start(ALL))
        assert set(states) == {"done"}, states
        history = await run.finish()
    return {name: sha256 for name, sums in pictures(history).items() for sha256 in sums}
