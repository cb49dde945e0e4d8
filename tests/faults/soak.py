"""The fault suite in its long form: `python -m tests.faults.soak --duration 1800 --seed 1` (`make soak DURATION=1800`).

First every scenario once, as the issue of faults describes it; then random faults every few seconds under load for the
rest of the time. The checker reads all records; a broken invariant ends the run with exit code 1, and all records and
logs stay in a folder that is named then. What was measured is printed as a table and, with `--json`, kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from tests.cluster.redis_process import sentinels
from tests.faults.aborter import Aborter
from tests.faults.checker import Violation, check
from tests.faults.cluster import FaultCluster
from tests.faults.history import History
from tests.faults.proxy import BOTH
from tests.faults.rank import POISON
from tests.faults.run import LONG, SHORT, Run, reference_of
from tests.faults.scenarios import deaths, load, network

REPLICAS = {"text_encoder": 1, "dit": 3, "vae": 1}
CLIENTS = 8
PAUSE_S = (2.0, 5.0)
FAILOVER = "F7 Sentinel failover"
RANDOM = "random faults"
Scenario = Callable[[Run], Awaitable[History]]
SCENARIOS: dict[str, Scenario] = {
    "F1 worker killed": lambda run: deaths.killed_workers(run, requests=60, kills=20),
    "F3 gateways killed before a checkpoint is noted": lambda run: deaths.killed_before_the_note(run, requests=12),
    "F4 gateway frozen": lambda run: deaths.frozen_gateway(run, requests=24),
    "F4 aborts behind a frozen gateway": lambda run: deaths.aborted_behind_a_frozen_owner(run, requests=9),
    "F5 gateway killed": lambda run: deaths.killed_gateway(run, requests=30),
    "F6 Redis killed": lambda run: deaths.killed_redis(run, requests=40, kills=3, away_s=5.0),
    "F8 worker cut off, F4 worker frozen": lambda run: network.silent_workers(run, requests=12),
    "F8 worker cut off one way": lambda run: network.silent_workers(run, requests=12, directions=("down",)),
    "F9 bad line to the VAE": lambda run: network.bad_line_to_the_vae(run, pictures=3, bytes_per_s=8e6, crowd=24),
    "F10 abort storm": lambda run: load.abort_storm(run, requests=200, within_s=5.0),
    "F11 flood": lambda run: load.flood(run, submits=1000),
    "F12 rolling restart": lambda run: deaths.rolling_restart(run, clients=8, waiting=4),
    "F12 poison": lambda run: poison(run, others=6),
}


async def poison(run: Run, others: int) -> History:
    """With three attempts, as by default. Every other scenario has more: it kills workers faster than anything else."""
    before = run.cluster.of("gateway")[0].table["gateway"]["max_attempts"]
    await asyncio.to_thread(run.cluster.reconfigure, "gateway", "gateway", max_attempts=3)
    history = await deaths.poison(run, others)
    await asyncio.to_thread(run.cluster.reconfigure, "gateway", "gateway", max_attempts=before)
    return history


async def random_faults(run: Run, duration_s: float) -> History:
    """Clients in a closed loop, some of which abort, and a fault every few seconds."""
    end_s = time.monotonic() + duration_s

    async def client(number: int, aborter: Aborter) -> None:
        while time.monotonic() < end_s:
            request_id = await run.clients.submit(run.random.choice((*SHORT, *LONG)), gateway=number)
            following = asyncio.create_task(run.clients.follow(request_id, gateway=number))
            if run.random.random() < 0.1:
                await asyncio.sleep(run.random.uniform(0, 2))
                await run.clients.abort(aborter, request_id, gateway=number + 1)
            if await following == "done":
                await run.clients.fetch(request_id, gateway=number)

    # Of its own: clients draw when they happen to be ready.
    chance = random.Random(run.random.random())
    counts = dict.fromkeys((fault.__name__ for fault in FAULTS), 0)
    async with Aborter() as aborter:
        clients = [asyncio.create_task(client(number, aborter)) for number in range(CLIENTS)]
        while time.monotonic() < end_s:
            fault = chance.choice(FAULTS)
            counts[fault.__name__] += 1
            await fault(run.cluster, chance)
            await asyncio.sleep(chance.uniform(*PAUSE_S))
        await asyncio.gather(*clients)
    history = await run.finish()
    states = [request["state"] for request in history.final["requests"].values()]
    run.measured |= {state: float(states.count(state)) for state in sorted(set(states))} | counts
    return history


async def kill_worker(cluster: FaultCluster, chance: random.Random) -> None:
    """Any stage's front."""
    chance.choice([*cluster.of("dit"), *cluster.of("vae"), *cluster.of("text_encoder")]).kill()


async def kill_rank(cluster: FaultCluster, chance: random.Random) -> None:
    """A denoiser's rank."""
    chance.choice(cluster.of("dit")).kill_rank()


async def kill_gateway(cluster: FaultCluster, chance: random.Random) -> None:
    """One of the two."""
    chance.choice(cluster.of("gateway")).kill()


async def stop_a_process(cluster: FaultCluster, chance: random.Random) -> None:
    """SIGTERM, as a scale-in or a rolling restart sends it."""
    chance.choice(list(cluster.processes.values())).terminate()


async def freeze_a_process(cluster: FaultCluster, chance: random.Random) -> None:
    """For up to four leases."""
    victim = chance.choice(list(cluster.processes.values()))
    victim.freeze()
    await asyncio.sleep(chance.uniform(0.5, 4 * cluster.lease_s))
    victim.thaw()


async def kill_redis(cluster: FaultCluster, chance: random.Random) -> None:
    """Away for a second or two."""
    cluster.kill_redis()
    await asyncio.sleep(chance.uniform(0.5, 2.0))
    cluster.revive_redis()


async def break_a_line(cluster: FaultCluster, chance: random.Random) -> None:
    """To one of the stage processes behind a proxy: a reset, or nothing passes for some seconds."""
    proxy = chance.choice(list(cluster.proxies.values()))
    if chance.random() < 0.5:
        proxy.reset()
        return
    proxy.cut(*chance.choice((BOTH, ("up",), ("down",))))
    await asyncio.sleep(chance.uniform(0.5, 8.0))
    proxy.heal()


FAULTS = (break_a_line, kill_worker, kill_rank, kill_gateway, stop_a_process, freeze_a_process, kill_redis)


@dataclass(slots=True)
class Soak:
    """What every part measured, and what the checker found."""

    seed: int
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    found: list[Violation] = field(default_factory=list)

    async def part(
        self, cluster: FaultCluster, reference: dict[str, str], name: str, scenario: Scenario, **may: bool
    ) -> None:
        """Runs a scenario; `may` is for the checker."""
        started_s = time.monotonic()
        await asyncio.to_thread(cluster.until_ready)
        async with Run(cluster, name.partition(" ")[0] + str(len(self.measured)), self.seed) as run:
            history = await scenario(run)
        run.measured["requests"] = float(len(history.accepted))
        run.measured["took_s"] = time.monotonic() - started_s
        self.measured[name] = run.measured
        broken = check(history, reference=reference, may_fail={POISON}, **may)
        self.found.extend(broken)
        if broken:
            kept = asdict(history) | {"broken": [asdict(violation) for violation in broken]}
            (cluster.folder / f"{name}.json").write_text(json.dumps(kept))
        print_part(name, run.measured, broken)

    async def run(self, folder: Path, duration_s: float, only: str) -> None:
        """All parts; with `only`, those whose names begin so."""
        end_s = time.monotonic() + duration_s
        if FAILOVER.startswith(only):
            await self._failover(folder / "failover")
        with FaultCluster(folder, REPLICAS) as cluster:
            reference = await reference_of(cluster)
            for name, scenario in SCENARIOS.items():
                if name.startswith(only):
                    await self.part(cluster, reference, name, scenario)
            if not RANDOM.startswith(only):
                return
            with cluster.behind_proxy("dit-2"), cluster.behind_proxy("vae-0"):
                rest_s = max(10.0, end_s - time.monotonic())
                await self.part(cluster, reference, RANDOM, lambda run: random_faults(run, rest_s))

    async def _failover(self, folder: Path) -> None:
        with sentinels(folder / "redis") as servers, FaultCluster(folder, REPLICAS, sentinels=servers) as cluster:
            reference = await reference_of(cluster)
            scenario = partial(deaths.failed_over_redis, requests=24)
            await self.part(cluster, reference, FAILOVER, scenario, may_be_lost=True)


def print_part(name: str, measured: dict[str, float], broken: list[Violation]) -> None:
    """A row of the table, and every broken invariant."""
    figures = ", ".join(f"{key} {value:.3g}" for key, value in measured.items())
    print(f"| {name} | {len(broken)} broken | {figures} |", flush=True)
    for violation in broken[:20]:
        print(f"    {violation.invariant} {violation.request_id}: {violation.message}", flush=True)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration", type=float, default=1800.0, help="seconds, scenarios included")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="nothing but the parts whose names begin so: F10, random")
    parser.add_argument(
        "--keep", type=Path, help="folder for records and logs; without it, one that goes if nothing is broken"
    )
    parser.add_argument("--json", type=Path, help="file to keep the figures in")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    # Also for a run that does not come to its end.
    print(f"records and logs: {folder}", flush=True)
    soak = Soak(args.seed)
    asyncio.run(soak.run(folder, args.duration, args.only))
    if not soak.found and args.keep is None:
        shutil.rmtree(folder)
    facts = {"seed": args.seed, "cores": os.cpu_count(), "broken": len(soak.found), "measured": soak.measured}
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{len(soak.found)} invariants broken" + (f": see {folder}" if soak.found else ""))
    sys.exit(bool(soak.found))


if __name__ == "__main__":
    main()
