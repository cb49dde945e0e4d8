"""Processes that are killed, frozen or ended while requests run: F1, F4, F5, F6 and F12 of the fault suite."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time

import httpx

from tests.faults.aborter import Aborter
from tests.faults.checker import AFTER_CANCEL_S, lost_writes
from tests.faults.clients import Recipe
from tests.faults.history import History
from tests.faults.measures import adopted_s, extra_steps, requeued_s
from tests.faults.rank import POISON
from tests.faults.run import LONG, SHORT, Run

FROZEN_LEASES = 3.0
BETWEEN_KILLS_S = (0.5, 1.5)


async def killed_workers(run: Run, requests: int, kills: int) -> History:
    """F1: SIGKILL to a denoiser, front or rank, by chance."""
    tasks = run.start(run.recipes(LONG, requests))
    for _ in range(kills):
        await asyncio.sleep(run.random.uniform(*BETWEEN_KILLS_S))
        victim = run.random.choice(run.cluster.of("dit"))
        (victim.kill if run.random.random() < 0.5 else victim.kill_rank)()
    await asyncio.gather(*tasks)
    history = await run.finish()
    note(run, "requeued_s", requeued_s(history))
    run.measured["extra_steps"] = extra_steps(history)
    return history


async def killed_before_the_note(run: Run, requests: int) -> History:
    """F3: a checkpoint is written, and the gateways die before Redis knows of it."""
    tasks = run.start(run.recipes(LONG, requests))
    await _owned(run, run.cluster.of("gateway")[0].name, 1)
    run.cluster.kill_redis()
    killed_s = time.time()
    async with asyncio.timeout(20):
        while not (written := _written_since(run, killed_s)):
            await asyncio.sleep(0.005)
    for gateway in run.cluster.of("gateway"):
        gateway.kill()
    run.cluster.revive_redis()
    await asyncio.gather(*tasks)
    history = await run.finish()
    run.measured |= {"unknown_checkpoints": float(len(written)), "extra_steps": extra_steps(history)}
    return history


def _written_since(run: Run, since_s: float) -> list[str]:
    """Checkpoints in the store that are younger."""
    latents = run.cluster.store / "latents"
    with contextlib.suppress(FileNotFoundError):
        whole = [path for path in latents.glob("*.*.*") if not path.name.startswith(".")]
        return [path.name for path in whole if path.stat().st_mtime > since_s]
    return []


async def frozen_gateway(run: Run, requests: int, owned_at_least: int = 2, gateway: int | None = None) -> History:
    """F4: a gateway that has so many requests stands still for several leases, and then goes on as if nothing was."""
    zombie = run.cluster.of("gateway")[0]
    tasks = []
    for number, recipe in enumerate(run.recipes(LONG, requests)):
        tasks += run.start([recipe], gateway=number if gateway is None else gateway)
        # In a crowd, another gateway may take it out of the queue.
        while gateway is not None and len(run.accepted()) <= number:
            await asyncio.sleep(0.01)
    owned = await _owned(run, zombie.name, owned_at_least)
    zombie.freeze()
    since_s = time.time()
    await asyncio.sleep(FROZEN_LEASES * run.cluster.lease_s)
    zombie.thaw()
    await asyncio.gather(*tasks)
    history = await run.finish()
    note(run, "adopted_s", adopted_s(history, owned, since_s))
    return history


async def aborted_behind_a_frozen_owner(run: Run, requests: int) -> History:
    """F4 and F10: aborts come to one gateway while the owner of so many requests stands still, and for long after."""
    frozen, other = 0, 1
    await asyncio.to_thread(run.cluster.until_ready)
    zombie = run.cluster.of("gateway")[frozen]
    ids = [await run.clients.submit(_very_long(seed), gateway=frozen) for seed in range(requests)]
    async with asyncio.timeout(30):
        # It has what came to it, but on a slow machine the other may be the first to see a free place.
        while (owners := list(run.owners().values())).count(zombie.name) < requests:
            if len(owners) == len(ids):
                ids.append(await run.clients.submit(_very_long(len(ids)), gateway=frozen))
            await asyncio.sleep(0.02)
    zombie.freeze()
    try:
        async with Aborter() as aborter:
            await asyncio.gather(*(run.clients.abort(aborter, request_id, gateway=other) for request_id in ids))
        await asyncio.gather(*(run.clients.follow(request_id, gateway=other) for request_id in ids))
        await asyncio.sleep(2 * AFTER_CANCEL_S)
    finally:
        zombie.thaw()
    return await run.finish()


async def killed_gateway(run: Run, requests: int) -> History:
    """F5: SIGKILL to the gateway that all clients follow their requests at."""
    victim = run.cluster.of("gateway")[0]
    tasks = run.start(run.recipes(LONG, requests), gateway=0)
    synchronous = asyncio.create_task(_synchronous_call(run.cluster.urls[0]))
    owned = await _owned(run, victim.name, 2)
    while len(run.accepted()) < requests:
        await asyncio.sleep(0.05)
    owned = await _owned(run, victim.name, 1)
    victim.kill()
    since_s = time.time()
    await asyncio.gather(*tasks)
    assert isinstance(await synchronous, httpx.TransportError)
    history = await run.finish()
    for request_id, line in list(history.accepted.items())[:5]:
        again = await run.clients.submit(Recipe(**line["recipe"]), gateway=1, key=line["key"])
        assert again == request_id
    note(run, "adopted_s", adopted_s(history, owned, since_s))
    return history


async def _synchronous_call(url: str) -> object:
    body = {"prompt": "waited for", "steps": 200, "size": "64x64"}
    async with httpx.AsyncClient(timeout=60) as client:
        try:
            return await client.post(f"{url}/v1/images/generations", json=body)
        except httpx.TransportError as error:
            return error


async def _owned(run: Run, gateway: str, count: int) -> list[str]:
    """Requests that a gateway has, once they are so many."""
    async with asyncio.timeout(30):
        while True:
            owned = [name for name, owner in run.owners().items() if owner == gateway]
            if len(owned) >= count:
                return owned
            await asyncio.sleep(0.02)


def _very_long(seed: int) -> Recipe:
    return Recipe("a very long one", seed=seed, steps=200)


async def killed_redis(run: Run, requests: int, kills: int, away_s: float) -> History:
    """F6: SIGKILL to Redis; it stays away for `away_s`."""
    tasks = run.start(run.recipes(LONG, requests))
    refused: list[float] = []
    for _ in range(kills):
        await asyncio.sleep(run.random.uniform(*BETWEEN_KILLS_S))
        run.cluster.kill_redis()
        back_s = time.monotonic() + away_s
        while time.monotonic() < back_s:
            refused.append(await _refusal_s(run))
        run.cluster.revive_redis()
    await asyncio.gather(*tasks)
    history = await run.finish()
    note(run, "refused_s", refused)
    return history


async def failed_over_redis(run: Run, requests: int) -> History:
    """F7: SIGKILL to the primary; the Sentinels make a replica the new one."""
    tasks = run.start(run.recipes(LONG, requests))
    await _owned(run, run.cluster.of("gateway")[0].name, 2)
    await asyncio.to_thread(run.cluster.kill_primary)
    since_s = time.monotonic()
    recipe = run.random.choice(SHORT)
    # Of the new primary, through the gateways: nothing is written before it is there.
    first = await run.clients.submit(recipe)
    run.measured["writes_back_s"] = time.monotonic() - since_s
    tasks.append(asyncio.create_task(run.clients.follow(first)))
    await asyncio.gather(*tasks)
    history = await run.finish()
    run.measured["lost_writes"] = float(sum(lost_writes(history).values()))
    return history


async def _refusal_s(run: Run) -> float:
    """How long a submit takes that must be refused, because Redis is away."""
    url = run.random.choice(run.cluster.urls)
    started_s = time.monotonic()
    async with httpx.AsyncClient(timeout=20) as client:
        answer = await client.post(f"{url}/v1/requests", json=SHORT[0].body())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "state_store_down"), answer.text
    return time.monotonic() - started_s


async def rolling_restart(run: Run, clients: int, waiting: int) -> History:
    """F12: SIGTERM to every process in turn, the next when the last one is back.

    Args:
        clients: that follow their requests.
        waiting: that wait in one call, by REST and as many by gRPC: longer than a gateway takes that just stops.
    """
    stopping = asyncio.Event()

    async def client(number: int) -> None:
        while not stopping.is_set():
            await run.clients.run(run.random.choice(SHORT), gateway=number)

    async def images(number: int) -> None:
        while not stopping.is_set():
            await run.waiting.image(run.random.choice(LONG), gateway=number)

    async def generate(_number: int) -> None:
        while not stopping.is_set():
            await run.waiting.generate(run.random.choice(LONG))

    kinds = ((client, clients), (images, waiting), (generate, waiting))
    tasks = [asyncio.create_task(kind(number)) for kind, count in kinds for number in range(count)]
    drained = []
    for process in list(run.cluster.processes.values()):
        started_s = time.monotonic()
        await asyncio.to_thread(process.restart)
        drained.append(time.monotonic() - started_s)
        await asyncio.to_thread(run.cluster.until_ready)
    stopping.set()
    await asyncio.gather(*tasks)
    history = await run.finish()
    note(run, "drained_s", drained)
    return history


async def poison(run: Run, others: int) -> History:
    """F12: a request that kills its worker each time, among others."""
    tasks = run.start(run.recipes(LONG, others))
    async with asyncio.timeout(30):
        while len(run.owners()) < others:
            await asyncio.sleep(0.02)
    await asyncio.gather(*tasks, *run.start([Recipe(POISON, seed=1)]))
    history = await run.finish()
    prompts = {name: line["recipe"]["prompt"] for name, line in history.accepted.items()}
    attempts = {name: request["attempt"] for name, request in history.final["requests"].items()}
    others_attempts = [attempts[name] for name in attempts if prompts[name] != POISON]
    run.measured["attempts_of_poison"] = max(attempts[name] for name in attempts if prompts[name] == POISON)
    run.measured["attempts_of_others"] = max(others_attempts, default=0)
    return history


def note(run: Run, name: str, seconds: list[float]) -> None:
    """Count, median and worst of what was measured."""
    run.measured[f"{name}_count"] = len(seconds)
    if seconds:
        run.measured[f"{name}_median"] = statistics.median(seconds)
        run.measured[f"{name}_max"] = max(seconds)
