"""`python -m gateway --config FILE`: gRPC and REST fronts, dispatcher and reaper in one event loop. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Sequence

import uvicorn
from fastapi import FastAPI
from prometheus_client import REGISTRY

from gateway.access import Door, open_keys
from gateway.backlog import Backlog
from gateway.config import GatewayConfig, GatewaySection
from gateway.dispatch import Dispatcher
from gateway.grpc_messages import MessageCredits
from gateway.http import create_app
from gateway.image_fetch import ImageFetcher
from gateway.lifecycle import Lifecycle
from gateway.links import Links
from gateway.recorded_state import RecordedState
from gateway.replicas import Replicas
from gateway.request_log import RequestLog
from gateway.requests import RequestService
from gateway.servicer import GatewayServicer
from gateway.store import open_store
from gateway.sweep import Sweep
from protos import gateway_pb2, gateway_pb2_grpc
from services.errors import StartupError
from services.server import (
    Health,
    bind,
    create_server,
    ensure_malloc,
    parse_arguments,
    run_service,
    stop_event,
)
from services.telemetry import setup
from services.tls import ServerCertificates
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
    # As for REST bodies.
    grpc_server = create_server([MessageCredits(section.max_held_bytes // 4)])
    gateway_pb2_grpc.add_GatewayServicer_to_server(GatewayServicer(door), grpc_server)
    health = Health(grpc_server, [gateway_pb2.DESCRIPTOR.services_by_name["Gateway"].full_name])
    certificates = ServerCertificates(config.tls) if config.tls.on else None
    bind(grpc_server, section.host, section.grpc_port, certificates)
    http_socket = _http_socket(section.host, section.http_port)
    rest = _rest_server(create_app(door, Backlog(state, replicas), section), section, certificates)
    stop = stop_event()
    await grpc_server.start()
    await health.set_serving(True)
    loops = [
        asyncio.create_task(work)
        for work in (
            state.listen(dispatcher.wake, dispatcher.cancel, dispatcher.forget),
            replicas.watch(),
            dispatcher.run(),
            dispatcher.reap(),
            sweep.run(),
            _serve_rest(rest, http_socket),
        )
    ]
    log.info("listening on %s: gRPC %d, HTTP %d", section.host, section.grpc_port, section.http_port)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({stopped, *loops}, return_when=asyncio.FIRST_COMPLETED)
    broken = [task for task in loops if task.done()]
    await health.set_serving(False)
    rest.should_exit = True
    await dispatcher.stop()
    await grpc_server.stop(grace=0.5)
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


def _rest_server(app: FastAPI, section: GatewaySection, certificates: ServerCertificates | None) -> uvicorn.Server:
    rest = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=2,
            limit_concurrency=section.max_connections,
            ssl_context_factory=None if certificates is None else lambda *_: certificates.ssl_context(),
        )
    )
    rest.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    return rest


async def _serve_rest(rest: uvicorn.Server, http_socket: socket.socket) -> None:
    # uvicorn's own `serve` takes the signals over; they are ours.
    with contextlib.suppress(asyncio.CancelledError):
        await rest._serve([http_socket])


def _http_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once (TCP_NODELAY) only where a socket names its protocol. Otherwise the second piece of an
    # answer waits until the client has acknowledged the first, which it puts off for 40 ms.
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
    except OSError as error:
        raise StartupError(f"HTTP port {host}:{port} cannot be bound: {error.strerror}") from error
    return opened


def main() -> None:
    """Reads the config and serves."""
    config = parse_arguments(GatewayConfig, "Lightloom gateway")
    setup(config.gateway.name or "gateway")
    asyncio.run(serve(config))


if __name__ == "__main__":
    ensure_malloc()
    run_service(main)
