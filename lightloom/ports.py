"""Ports of this machine: whether one can be had, and who listens on it."""

from __future__ import annotations

import contextlib
import socket

import psutil

from services.errors import StartupError

ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - what is listened on, not by us


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
