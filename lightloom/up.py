"""`lightloom up`: a cluster in the foreground, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lightloom.cluster_config import ClusterConfig, load_cluster, parse_replicas
from lightloom.launcher import Cluster
from lightloom.show import show_processes


async def serve(config_path: Path, replica_settings: list[str], run_dir: Path) -> None:
    """Runs the cluster of a config file.

    Raises:
        StartupError: it cannot start, or a process gave up for good.
    """
    config = with_replicas(load_cluster(config_path), parse_replicas(replica_settings))
    console = Console(stderr=True)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    started_s = time.monotonic()
    async with Cluster(config, run_dir) as cluster:
        with console.status(f"starting {', '.join(config.models)} (logs in {run_dir / 'logs'})"):
            if await _until_stopped(stop, cluster.wait_ready()):
                return
        show_processes(cluster.status())
        console.print(f"ready after {time.monotonic() - started_s:.1f} s")
        scheme = "https" if config.gateway.tls.on else "http"
        console.print(f"REST and web page  {scheme}://{cluster.http_address}")
        console.print(f"gRPC               {cluster.grpc_address}")
        console.print("Ctrl-C stops everything.")
        await _until_stopped(stop, cluster.wait_failure())
        console.print("stopping ...")


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
