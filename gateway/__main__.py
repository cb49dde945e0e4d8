"""`python -m gateway --config FILE`: gRPC and REST fronts, dispatcher and reaper in one event loop. No torch."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Sequence

from prometheus_client import REGISTRY

from gateway.access import Door, open_keys
from gateway.backlog import Backlog
from gateway.config import GatewayConfig
from gateway.dispatch import Dispatcher
from gateway.fronts import Fronts
from gateway.image_fetch import ImageFetcher
from gateway.lifecycle import Lifecycle
from gateway.links import Links
from gateway.recorded_state import RecordedState
from gateway.replicas import Replicas
from gateway.request_log import RequestLog
from gateway.requests import RequestService
from gateway.store import open_store
from gateway.sweep import Sweep
from services.server import ensure_malloc, parse_arguments, run_service, stop_event
from services.telemetry import setup
from services.tls import read as read_certificates

log = logging.getLogger("gateway")


async def serve(config: GatewayConfig) -> None:
    """Runs until SIGTERM.

    Raises:
        StartupError: a port or the store cannot be had.
        Exception: what ended one of the loops.
    """
    section = config.gateway
    name = section.name or f"{socket.gethostname()}-{os.getpid()}"
    keys = open_keys(config)
    read_certificates(config.stage_tls)
    requests = RequestLog(REGISTRY)
    state = RecordedState(config.redis, name, requests)
    links = Links(state.shared_key, config.store.link_key_file, config.store.link_s)
    store = open_store(config.store)
    sweep = Sweep(state, store, config.store, section.keep_s, REGISTRY)
    replicas = Replicas(config.stages, lambda: dispatcher.wake(), config.stage_tls)
    lifecycle = Lifecycle(state, replicas, store, section, "gateway")
    dispatcher = Dispatcher(state, replicas, lifecycle, store.writes, section)
    store.writes.on_open = dispatcher.wake
    service = RequestService(state, dispatcher, replicas, store, links, section, config.tenants)
    fetcher = ImageFetcher(config.inputs)
    door = Door(service, keys, fetcher, requests)
    fronts = Fronts(door, Backlog(state, replicas), config)
    stop = stop_event()
    await fronts.start()
    loops = [
        asyncio.create_task(work)
        for work in (
            state.listen(dispatcher.wake, dispatcher.cancel, dispatcher.forget),
            replicas.watch(),
            dispatcher.run(),
            dispatcher.reap(),
            sweep.run(),
            fronts.serve_rest(),
        )
    ]
    log.info("listening on %s: gRPC %d, HTTP %d", section.host, section.grpc_port, section.http_port)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({stopped, *loops}, return_when=asyncio.FIRST_COMPLETED)
    broken = [task for task in loops if task.done()]
    # Whoever waits for an answer gets it from here: until then, this gateway works as ever.
    await fronts.leave(0.0 if broken else section.drain_s)
    await dispatcher.stop()
    await fronts.stop()
    await _end(loops[:-1])
    await asyncio.wait({loops[-1]})
    await state.close()
    await fetcher.close()
    for task in broken:
        # None ends by itself: the process must not end as if it had been told to.
        task.result()


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancels until all have ended: a cancel that meets an answer can be lost in a library."""
    while pending := {task for task in tasks if not task.done()}:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=0.5)


def main() -> None:
    """Reads the config and serves."""
    config = parse_arguments(GatewayConfig, "Lightloom gateway")
    setup(config.gateway.name or "gateway")
    asyncio.run(serve(config))


if __name__ == "__main__":
    ensure_malloc()
    run_service(main)
