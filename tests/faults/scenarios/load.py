"""Too much at once: the abort storm F10 and the flood F11 of the fault suite."""

from __future__ import annotations

import asyncio

from tests.faults.aborter import Aborter
from tests.faults.clients import Recipe
from tests.faults.history import History
from tests.faults.measures import aborts_s, refusals
from tests.faults.run import SHORT, Run
from tests.faults.scenarios.deaths import note

SENDERS = 50


async def abort_storm(run: Run, requests: int, within_s: float) -> History:
    """F10: half of the requests are aborted at a random moment, some twice, through any gateway."""

    async def client(aborter: Aborter, recipe: Recipe, number: int, doomed: bool) -> None:
        request_id = await run.clients.submit(recipe, gateway=number)
        following = asyncio.create_task(run.clients.follow(request_id, gateway=number))
        if doomed:
            await asyncio.sleep(run.random.uniform(0, within_s))
            times = 2 if run.random.random() < 0.2 else 1
            aborts = (run.clients.abort(aborter, request_id, gateway=number + index) for index in range(times))
            await asyncio.gather(*aborts)
        await following

    recipes = run.recipes(SHORT, requests)
    async with Aborter() as aborter:
        clients = (client(aborter, recipe, number, number % 2 == 0) for number, recipe in enumerate(recipes))
        await asyncio.gather(*clients)
    history = await run.finish()
    queued, running = aborts_s(history)
    note(run, "queued_abort_s", queued)
    note(run, "running_abort_s", running)
    states = [request["state"] for request in history.final["requests"].values()]
    run.measured |= {f"{state}": float(states.count(state)) for state in ("done", "cancelled")}
    return history


async def flood(run: Run, submits: int) -> History:
    """F11, without its tenants: far more submits than the queue takes, at both gateways."""
    recipes = iter([Recipe("a flood", seed=1, steps=5)] * submits)

    async def sender(number: int) -> None:
        for recipe in recipes:
            await run.clients.submit(recipe, gateway=number, patience_s=0.0)

    async with run.gateway_growth():
        await asyncio.gather(*(sender(number) for number in range(SENDERS)))
        history = await run.finish()
    refused = refusals(history)
    run.measured |= {"accepted": float(len(history.accepted)), "refused": float(len(refused))}
    assert all(line["status"] == 429 and float(line["retry_after"]) > 0 for line in refused), refused[:3]
    return history
