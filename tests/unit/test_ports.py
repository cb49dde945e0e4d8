"""Ports: who listens, what is refused, and how an address is written for clients."""

from __future__ import annotations

import os
import socket

import pytest

from lightloom.ports import address_of, listens, try_port
from services.errors import StartupError
from services.free_port import HANDED_OUT, free_port


@pytest.mark.parametrize(
    ("host", "written"),
    [
        ("127.0.0.1", "127.0.0.1:80"),
        ("0.0.0.0", "127.0.0.1:80"),
        ("::", "[::1]:80"),
        ("fd00::5", "[fd00::5]:80"),
        ("gpu-7", "gpu-7:80"),
    ],
)
def test_an_address_is_one_that_clients_can_call(host: str, written: str) -> None:
    assert address_of(host, 80) == written


def test_only_the_process_that_listens_has_the_port() -> None:
    with socket.socket() as ours:
        ours.bind(("127.0.0.1", 0))
        port = ours.getsockname()[1]
        assert not listens(os.getpid(), port)
        ours.listen()
        assert listens(os.getpid(), port)
        assert not listens(os.getppid(), port)
        with pytest.raises(StartupError, match=f"HTTP port 127.0.0.1:{port} cannot be bound: Address already in use"):
            try_port("HTTP", "127.0.0.1", port)
    try_port("HTTP", "127.0.0.1", port)


def test_a_host_of_another_machine_is_refused() -> None:
    with pytest.raises(StartupError, match="gRPC port 192.0.2.1:.*cannot be bound"):
        try_port("gRPC", "192.0.2.1", free_port())


def test_free_ports_are_not_those_of_outgoing_connections() -> None:
    first, last = map(int, HANDED_OUT.read_text().split())
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40
    assert not any(first <= port <= last for port in ports)
