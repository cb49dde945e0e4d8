"""The REST front beside requests' own life: streams that wait, probes, the description of the API."""

from __future__ import annotations

import html
import re
import statistics
import time
from collections.abc import Iterator

import pytest

from gateway.http_sse import HEARTBEAT, HEARTBEAT_S
from tests.cluster.gateway_process import GatewayProcess
from tests.cluster.sleeping import sleeping_gateway

BODY = {"prompt": "a red circle", "steps": 2}


@pytest.fixture(scope="module")
def running(tmp_path_factory, one_by_one) -> Iterator[GatewayProcess]:
    with sleeping_gateway(tmp_path_factory.mktemp("rest"), one_by_one) as made:
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


def test_answers_on_one_connection_do_not_wait_for_the_clients_acknowledgements(running):
    seconds = []
    for _ in range(30):
        started_s = time.monotonic()
        assert running.rest.get("/v1/models").status_code == 200
        seconds.append(time.monotonic() - started_s)
    # Linux puts an acknowledgement off for 40 ms, once a connection has seen some answers: then every answer is late.
    assert statistics.quantiles(seconds[10:])[0] < 0.03


def test_the_page_of_the_api_has_every_call_with_its_fields_and_needs_nothing_from_elsewhere(running):
    api = running.rest.get("/openapi.json").json()
    page = running.rest.get("/docs").text
    for path, methods in api["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in page
            assert f"data-method='{method.upper()}' data-path='{path}'" in page
    for name in ("ImageRequest", "GenerationRequest"):
        for field, schema in api["components"]["schemas"][name]["properties"].items():
            assert f"<code>{field}</code>" in page
            assert html.escape(schema.get("description", "")) in page
    assert "<td><code>prompt</code> (required)</td><td>string</td>" in page
    assert "<td><code>n</code></td><td>integer, at least 1, at most 10</td>" in page
    assert "<td><code>inputs[].data_url</code> (required)</td>" in page
    assert "multipart/form-data" in page
    assert not re.findall(r"(?:src|href)=[\"\']?(?:https?:)?//", page)
