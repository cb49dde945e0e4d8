"""The REST front beside requests' own life: streams that wait, probes, the description of the API."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from gateway.http_sse import HEARTBEAT, HEARTBEAT_S
from tests.cluster.gateway_process import GatewayProcess
from tests.cluster.sleeping import sleeping_gateway

BODY = {"prompt": "a red circle", "steps": 2}


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[GatewayProcess]:
    with sleeping_gateway(tmp_path_factory.mktemp("rest"), dit_slots=1) as made:
        yield made


def test_a_stream_of_a_request_that_waits_is_not_silent(running):
    before = [running.rest.post("/v1/requests", json={**BODY, "steps": 200}).json()["id"] for _ in range(4)]
    started_s = time.monotonic()
    with running.rest.stream("POST", "/v1/images/generations", json={**BODY, "stream": True}) as streamed:
        assert next(streamed.iter_text()) == HEARTBEAT
    assert time.monotonic() - started_s < HEARTBEAT_S + 5
    for request_id in before:
        running.rest.delete(f"/v1/requests/{request_id}")


def test_probes_may_ask_without_a_body(running):
    answer = running.rest.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")
