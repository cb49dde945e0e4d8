"""`python -m gateway --config FILE`: gRPC and REST fronts, dispatcher and reaper in one event loop. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path

import uvicorn

from gateway.backlog import Backlog
from gateway.config import GatewayConfig, redis_url
from gateway.dispatch import Dispatcher
from gateway.http import create_app
from gateway.lifecycle import Lifecycle
from gateway.replicas import Replicas
from gateway.requests import RequestService
from gateway.servicer import GatewayServicer
from gateway.state import State
from gateway.store import Store
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

log = logging.getLogger("gateway")


async def serve(config: GatewayConfig) -> None:
    """Runs until SIGTERM.

    Raises:
        StartupError: a port or the store cannot be had.
        Exception: what ended one of the loops.
    """
    section = config.gateway
    name = section.name or f"{socket.gethostname()}-{os.getpid()}"
    state = State(redis_url(config.redis), name)
    store = Store(Path(config.store.path))
    replicas = Replicas(config.stages, lambda: dispatcher.wake())
    lifecycle = Lifecycle(state, replicas, store, section, "gateway")
    dispatcher = Dispatcher(state, replicas, lifecycle, section)
    service = RequestService(state, dispatcher, replicas, store, section)
    grpc_server = create_server()
    gateway_pb2_grpc.add_GatewayServicer_to_server(GatewayServicer(service), grpc_server)
    health = Health(grpc_server, [gateway_pb2.DESCRIPTOR.services_by_name["Gateway"].full_name])
    bind(grpc_server, section.host, section.grpc_port)
    http_socket = _http_socket(section.host, section.http_port)
    app = create_app(service, Backlog(state, replicas), section)
    rest = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2))
    rest.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    stop = stop_event()
    await grpc_server.start()
    await health.set_serving(True)
    loops = [
        asyncio.create_task(work)
        for work in (
            state.listen(dispatcher.wake, dispatcher.cancel),
            replicas.watch(),
            dispatcher.run(),
            dispatcher.reap(),
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
    for task in loops[:-1]:
        task.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
    await state.close()
    for task in broken:
        # None ends by itself: the process must not end as if it had been told to.
        task.result()


async def _serve_rest(rest: uvicorn.Server, http_socket: socket.socket) -> None:
    # uvicorn's own `serve` takes the signals over; they are ours.
    with contextlib.suppress(asyncio.CancelledError):
        await rest._serve([http_socket])


def _http_socket(host: str, port: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
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
