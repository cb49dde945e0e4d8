"""`lightloom up`: a cluster in the foreground, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lightloom.cluster_config import ClusterConfig, check_files, load_cluster, parse_replicas
from lightloom.launcher import Cluster
from lightloom.layouts import check_layouts, special_stages
from lightloom.member import ProcessRow
from lightloom.show import show_processes

LOOK_EVERY_S = 1.0


async def serve(config_path: Path, replica_settings: list[str], run_dir: Path) -> None:
    """Runs the cluster of a config file.

    Raises:
        StartupError: it cannot start, or a process gave up for good.
    """
    config = with_replicas(load_cluster(config_path), parse_replicas(replica_settings))
    check_files(config)
    console = Console(stderr=True, highlight=False)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    cluster = Cluster(config, run_dir)
    try:
        await cluster.open()
        if await _until_stopped(stop, _check_layouts(config, console)):
            return
        await cluster.start()
        console.print(f"starting {', '.join(config.models)}; logs are in {run_dir / 'logs'}", soft_wrap=True)
        show_processes(console, cluster.status())
        await _run_until(stop, cluster, console)
    finally:
        await cluster.stop()


async def _check_layouts(config: ClusterConfig, console: Console) -> None:
    if special := special_stages(config):
        # Seen on a terminal only, and gone when it is known.
        with console.status(f"checking {', '.join(f'{model} {kind}' for model, kind, _ in special)}"):
            await check_layouts(special)


async def _run_until(stop: asyncio.Event, cluster: Cluster, console: Console) -> None:
    reporter = Reporter(cluster, console)
    reports = asyncio.create_task(reporter.run())
    try:
        if await _until_stopped(stop, cluster.wait_ready()):
            return
        await reporter.report()
        _say_ready(console, cluster, reporter.age_s)
        await _until_stopped(stop, cluster.wait_failure())
        console.print("stopping ...")
    finally:
        reports.cancel()


def _say_ready(console: Console, cluster: Cluster, seconds: float) -> None:
    scheme = "https" if cluster.config.gateway.tls.on else "http"
    console.print(f"ready after {seconds:.1f} s")
    console.print(f"REST and web page  {scheme}://{cluster.http_address}")
    console.print(f"gRPC               {cluster.grpc_address}")
    console.print("Ctrl-C stops everything.")


class Reporter:
    """Says what has changed about the processes of a cluster."""

    def __init__(self, cluster: Cluster, console: Console) -> None:
        self._cluster = cluster
        self._console = console
        self._born_s = time.monotonic()
        self._known = {row["name"]: row for row in cluster.status()}

    @property
    def age_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._born_s

    async def run(self) -> None:
        """Reports until it is cancelled."""
        while True:
            await self.report()
            await asyncio.sleep(LOOK_EVERY_S)

    async def report(self) -> None:
        """One line a change since the last report."""
        rows = {row["name"]: row for row in await self._cluster.look()}
        known, self._known = self._known, rows
        for name, row in rows.items():
            for change in changes(known.get(name), row):
                self._console.print(f"{self.age_s:7.1f} s  {name} {change}", soft_wrap=True)
        for name in known.keys() - rows.keys():
            self._console.print(f"{self.age_s:7.1f} s  {name} leaves", soft_wrap=True)


def changes(before: ProcessRow | None, now: ProcessRow) -> Iterator[str]:
    """What happened to a process between two looks, in words."""
    if before is None:
        yield f"starts at {now['address']}"
        return
    if before["pid"] and now["pid"] != before["pid"]:
        yield "died"
    if now["restarts"] > before["restarts"]:
        yield f"was started again (restarts: {now['restarts']})"
    if now["rank_restarts"] > before["rank_restarts"]:
        yield f"lost a rank, and started its ranks again (rank restarts: {now['rank_restarts']})"
    if now["state"] == "serving" and before["state"] != "serving":
        yield "serves"


def with_replicas(config: ClusterConfig, replicas: dict[str, int]) -> ClusterConfig:
    """The config with these replica counts for every model."""
    models = {name: replace(entry, replicas={**entry.replicas, **replicas}) for name, entry in config.models.items()}
    return replace(config, models=models)


async def _until_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Waits for the work or the stop signal; True when it was the signal. Raises what the work raises."""
    task, stopped = asyncio.ensure_future(work), asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        stopped.cancel()
        task.result()
        return False
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return True
