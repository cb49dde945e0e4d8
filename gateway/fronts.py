"""The gateway's servers: gRPC, REST, and health checks in plain text for probes that have no certificate."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket

import uvicorn

from gateway.access import Door
from gateway.backlog import Backlog
from gateway.config import GatewayConfig
from gateway.grpc_access import KeyCheck
from gateway.grpc_messages import MessageCredits
from gateway.http import create_app
from gateway.servicer import GatewayServicer
from protos import gateway_pb2, gateway_pb2_grpc
from services.errors import StartupError
from services.server import Health, bind, create_server
from services.tls import ServerCertificates

GRACE_S = 0.5
# A call that is on its way over an open connection finds it open for so long.
LINGER_S = 1.0
_CLOSE = (b"connection", b"close")


class Fronts:
    """All of them, bound; they answer from `start` on.

    Raises:
        StartupError: a port cannot be had.
    """

    def __init__(self, door: Door, backlog: Backlog, config: GatewayConfig) -> None:
        section = config.gateway
        certificates = ServerCertificates(config.tls) if config.tls.on else None
        service = gateway_pb2.DESCRIPTOR.services_by_name["Gateway"].full_name
        # As for REST bodies.
        credits = MessageCredits(section.max_held_bytes // 4)
        self._grpc = create_server([KeyCheck(door, service), credits])
        self._servicer = GatewayServicer(door)
        gateway_pb2_grpc.add_GatewayServicer_to_server(self._servicer, self._grpc)
        self._health = Health(self._grpc, [service])
        bind(self._grpc, section.host, section.grpc_port, certificates)
        self._probes = create_server()
        if section.health_port:
            self._health.answer_on(self._probes)
            bind(self._probes, section.host, section.health_port)
        self._socket = _http_socket(section.host, section.http_port)
        self._rest = uvicorn.Server(
            uvicorn.Config(
                create_app(door, backlog, section),
                log_config=None,
                access_log=False,
                limit_concurrency=section.max_connections,
                ssl_context_factory=None if certificates is None else lambda *_: certificates.ssl_context(),
            )
        )
        self._rest.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self._rest_ended = asyncio.Event()

    async def start(self) -> None:
        """Answers gRPC and probes."""
        await self._grpc.start()
        await self._probes.start()
        await self._health.set_serving(True)

    async def serve_rest(self) -> None:
        """Answers REST until `leave`."""
        # uvicorn's own `serve` takes the signals over; they are ours.
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await self._rest._serve([self._socket])
        finally:
            self._rest_ended.set()

    async def leave(self, drain_s: float) -> None:
        """Says that it stops, lets nobody new in, and waits for the calls that are there: `drain_s` at most."""
        await self._health.set_serving(False)
        self._rest.config.timeout_graceful_shutdown = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await asyncio.gather(self._grpc.stop(math.inf), self._leave_rest(drain_s))
        # With less time than it lingers it has not come so far.
        self._rest.should_exit = True
        # Who follows a request by a call that is ended from now on has not left it.
        self._servicer.leaving = True

    async def _leave_rest(self, drain_s: float) -> None:
        """Closes the port at once, and connections behind the answer to their next call, or when none comes soon.

        uvicorn would close those at once that have no call, and with them calls that their clients have just sent.
        """
        state, config = self._rest.server_state, self._rest.config
        if self._rest.started:
            for server in self._rest.servers:
                server.close()
        # uvicorn makes the headers of all answers anew each second, with those of its config.
        config.encoded_headers.append(_CLOSE)
        state.default_headers = [*state.default_headers, _CLOSE]
        left_s = drain_s
        if state.connections:
            await asyncio.sleep(LINGER_S)
            left_s -= LINGER_S
        config.timeout_graceful_shutdown = math.ceil(left_s)
        self._rest.should_exit = True
        await self._rest_ended.wait()

    async def stop(self) -> None:
        """Ends the gRPC calls that are still there. Requests that they follow go on at another gateway."""
        await self._grpc.stop(GRACE_S)
        await self._probes.stop(None)


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
