"""A bad network between gateways and stages: F8 and F9 of the fault suite; and the frozen worker of F4."""

from __future__ import annotations

import asyncio
import time

from tests.faults.history import History
from tests.faults.measures import adopted_s
from tests.faults.run import LARGE, LONG, Run
from tests.faults.scenarios.deaths import note

HEARD_NOTHING_S = 40.0
CROWD_BYTES_PER_S = 40e6


async def silent_workers(run: Run, requests: int, directions: tuple[str, ...] = ("up", "down")) -> History:
    """F8 and F4: one denoiser is cut off, one is frozen; both come back when their requests are elsewhere."""
    cut, frozen = run.cluster.of("dit")[:2]
    with run.cluster.behind_proxy(cut.name) as proxy:
        tasks = run.start(run.recipes(LONG, requests))
        held = {name: await _denoised_at(run, name) for name in (cut.name, frozen.name)}
        proxy.cut(*directions)
        frozen.freeze()
        since_s = time.time()
        affected = {request_id for ids in held.values() for request_id in ids}
        await _elsewhere(run, affected)
        proxy.heal()
        frozen.thaw()
        await asyncio.gather(*tasks)
        history = await run.finish()
    for name, ids in held.items():
        note(run, f"{'cut' if name == cut.name else 'frozen'}_found_s", adopted_s(history, ids, since_s))
    return history


async def _denoised_at(run: Run, replica: str) -> list[str]:
    """Requests that a replica has begun with and not ended, once there are any."""
    async with asyncio.timeout(30):
        while True:
            running = set(run.owners())
            ids = [line["id"] for line in run.begun(replica) if line["id"] in running]
            if ids:
                return ids
            await asyncio.sleep(0.05)


async def _elsewhere(run: Run, ids: set[str]) -> None:
    """Waits until none of these runs under the fence that it has now."""
    before = run.fences(ids)
    async with asyncio.timeout(HEARD_NOTHING_S):
        while any(fence == before[name] for name, fence in run.fences(ids).items()):
            await asyncio.sleep(0.1)


async def bad_line_to_the_vae(run: Run, pictures: int, bytes_per_s: float, crowd: int) -> History:
    """F9: latents of 20 MiB over a slow line, reset inside the stream, and with one byte changed; then `crowd` more at
    once over a less slow one.
    """
    [vae] = run.cluster.of("vae")
    with run.cluster.behind_proxy(vae.name) as proxy:
        proxy.slow(delay_s=0.05, bytes_per_s=bytes_per_s)
        async with run.gateway_growth():
            for number in range(pictures):
                # At each gateway in turn: they learn from it how large latents are.
                [task] = run.start([LARGE], gateway=number)
                if number % 3 == 0:
                    proxy.reset_after("up", run.random.randrange(2_000_000, 15_000_000))
                elif number % 3 == 1:
                    proxy.flip_after("up", run.random.randrange(2_000_000, 15_000_000))
                await task
            proxy.slow(delay_s=0.01, bytes_per_s=CROWD_BYTES_PER_S)
            # One of the three may have gone on at the other gateway.
            each = [LARGE] * len(run.cluster.of("gateway"))
            await asyncio.gather(*run.start(each))
            await asyncio.gather(*run.start([LARGE] * crowd))
        proxy.slow()
        history = await run.finish()
    begun = history.of_workers("begin")
    transfers = [line for name in history.accepted for line in begun[name] if line["replica"] == vae.name]
    run.measured["transfers_repeated"] = float(len(transfers) - pictures - len(each) - crowd)
    return history
