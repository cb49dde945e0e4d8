"""A port for a server that another process is about to start."""

from __future__ import annotations

import contextlib
import secrets
import socket
from pathlib import Path

# First and last port that the kernel gives to outgoing connections.
HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST_PORT = 10_000


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nothing listens on now, and that no outgoing connection takes before its server does.

    Raises:
        OSError: the host is no address of this machine.
    """
    with socket.socket() as probe:
        probe.bind((host, 0))
        given: int = probe.getsockname()[1]
    below = int(HANDED_OUT.read_text().split()[0]) if HANDED_OUT.exists() else FIRST_PORT
    while below > FIRST_PORT:
        port = FIRST_PORT + secrets.randbelow(below - FIRST_PORT)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    return given
