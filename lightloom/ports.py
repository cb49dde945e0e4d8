"""Ports of this machine: a free one, whether one can be had, and who listens on it."""

from __future__ import annotations

import contextlib
import secrets
import socket
from pathlib import Path

import psutil

from services.errors import StartupError

ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - what is listened on, not by us


# First and last port that the kernel gives to outgoing connections.
HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST_PORT = 10_000


def free_port() -> int:
    """A loopback port that nothing listens on now, and that no outgoing connection takes before its server does."""
    below = int(HANDED_OUT.read_text().split()[0]) if HANDED_OUT.exists() else FIRST_PORT
    while below > FIRST_PORT:
        port = FIRST_PORT + secrets.randbelow(below - FIRST_PORT)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        given: int = probe.getsockname()[1]
        return given


def try_port(name: str, host: str, port: int) -> None:
    """Binds the port and lets it go.

    Args:
        name: what it is for, "HTTP" or "gRPC".

    Raises:
        StartupError: it is taken, or not to be had.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As the gateway does: what has closed a moment ago is no hindrance, what listens is.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartupError(
                f"{name} port {host}:{port} cannot be bound: {error.strerror or error}; stop what listens there, or "
                "choose another port in the config"
            ) from error


def listens(pid: int, port: int) -> bool:
    """Whether that process, and no other, listens on the TCP port."""
    with contextlib.suppress(psutil.Error):
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            for connection in psutil.Process(pid).net_connections("tcp")
        )
    return False


def reachable(host: str) -> str:
    """An address that reaches a server of this machine which listens on `host`."""
    return ANY_HOST.get(host, host)


def address_of(host: str, port: int) -> str:
    """host:port as clients write it."""
    name = reachable(host)
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
