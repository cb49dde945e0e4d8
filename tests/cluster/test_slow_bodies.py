"""REST callers that never finish their bodies, or never go: a gateway bounds their time, bytes and number."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest

from tests.cluster.gateway_process import GatewayProcess, gateway
from tests.cluster.redis_process import redis_process

MIB = 1024 * 1024
# The gateway lets bodies hold a quarter of it.
SETTINGS = {"body_timeout_s": 1.5, "max_held_bytes": 8 * MIB, "max_connections": 6}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Iterator[GatewayProcess]:
    """A gateway without stages: what is tested comes before them."""
    folder = tmp_path_factory.mktemp("slow")
    nobody = dict.fromkeys(("text_encoder", "dit", "vae"), "127.0.0.1:1")
    with (
        redis_process(folder / "redis", "maxmemory-policy noeviction") as server,
        gateway(folder, f"redis://127.0.0.1:{server.port}/0", nobody, 503, settings={"gateway": SETTINGS}) as running,
    ):
        yield running


@contextlib.contextmanager
def unfinished(running: GatewayProcess, nbytes: int) -> Iterator[socket.socket]:
    """A request whose body breaks off."""
    head = (
        f"POST /v1/requests HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {4 * MIB}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", running.http_port), timeout=10) as connection:
        connection.sendall(head.encode() + b'{"prompt": "' + b"a" * nbytes)
        yield connection


def answer(connection: socket.socket) -> tuple[int, str]:
    """Status and code, of a server that closes behind its answer."""
    data = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_a_body_that_never_ends_is_given_up_in_time(alone) -> None:
    started_s = time.monotonic()
    with unfinished(alone, 100) as one, unfinished(alone, MIB) as other:
        assert answer(one) == answer(other) == (408, "request_timeout")
    assert 1.4 < time.monotonic() - started_s < 5.0


def test_bodies_that_arrive_at_once_are_bounded_in_bytes(alone) -> None:
    with unfinished(alone, MIB), unfinished(alone, MIB - 100):
        time.sleep(0.3)
        refused = alone.rest.post("/v1/requests", json={"prompt": "a" * MIB})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded"), refused.text
        assert refused.headers["retry-after"] == "1"


def test_connections_are_bounded(alone) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(SETTINGS["max_connections"]):
            stack.enter_context(socket.create_connection(("127.0.0.1", alone.http_port)))
        time.sleep(0.3)
        assert alone.rest.get("/v1/models").status_code == 503
    time.sleep(0.3)
    assert alone.rest.get("/v1/models").status_code == 200
