"""What an operator sees of requests at a real gateway: counts and times on /metrics, and lines in the log."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import pytest

from lightloom import Client
from services.errors import InvalidRequest
from tests.cluster.gateway_process import GatewayProcess, gateway
from tests.cluster.running import wait_for
from tests.cluster.sleeping import sleeping_cluster, sleeping_gateway

BODY = {"prompt": "a red circle", "steps": 2}
IMPATIENT = {"gateway": {"request_timeout_s": 0.5}}
LINE = re.compile(r"lightloom_(?P<name>\w+)(\{(?P<labels>.*)\})? (?P<value>\S+)")


@pytest.fixture(scope="module")
def running(tmp_path_factory, sleeping) -> Iterator[GatewayProcess]:
    with sleeping_gateway(tmp_path_factory.mktemp("log"), sleeping) as made:
        yield made


def counted(running: GatewayProcess, name: str, **labels: str) -> float:
    """The sum of a metric over all label values that are not named."""
    total = 0.0
    for line in running.rest.get("/metrics").text.splitlines():
        match = LINE.fullmatch(line)
        if match and match["name"] == name:
            found = dict(re.findall(r'(\w+)="([^"]*)"', match["labels"] or ""))
            if labels.items() <= found.items():
                total += float(match["value"])
    return total


def lines(running: GatewayProcess, **wanted: str) -> list[dict]:
    found = [json.loads(line) for line in running.log.read_text().splitlines()]
    return [line for line in found if wanted.items() <= line.items()]


def told(running: GatewayProcess, request_id: str) -> list[str]:
    return [line["message"] for line in lines(running, request_id=request_id)]


def test_a_finished_request_is_counted_timed_and_logged(running):
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
    answer = running.rest.post("/v1/images/generations", json=BODY, headers=headers)
    request_id = answer.headers["x-request-id"]
    wait_for(lambda: told(running, request_id) == ["accepted", "done"])
    accepted, done = lines(running, request_id=request_id)
    assert (accepted["model"], accepted["tenant"], accepted["trace_id"]) == ("sleeping", "anonymous", trace_id)
    assert done["trace_id"] == trace_id
    record = running.rest.get(f"/v1/requests/{request_id}").json()
    assert done["seconds"] == pytest.approx(record["updated_at"] - record["created_at"], abs=0.002)
    assert done["queued_s"] == pytest.approx(record["queued_s"], abs=0.002)
    assert counted(running, "requests_total", model="sleeping", state="accepted") == 1
    assert counted(running, "requests_total", model="sleeping", state="done", code="") == 1
    assert counted(running, "request_seconds_count", model="sleeping", state="done") == 1
    assert counted(running, "request_seconds_sum", state="done") == pytest.approx(done["seconds"], abs=0.01)
    assert counted(running, "request_queued_seconds_count", model="sleeping") == 1
    route = "/v1/images/generations"
    assert counted(running, "http_responses_total", method="POST", route=route, status="200") == 1
    assert "a red circle" not in running.log.read_text()


def test_an_aborted_request_is_counted_once(running):
    request_id = running.rest.post("/v1/requests", json={**BODY, "steps": 200}).json()["id"]
    for _ in range(3):
        running.rest.delete(f"/v1/requests/{request_id}")
    wait_for(lambda: running.rest.get(f"/v1/requests/{request_id}").json()["state"] == "cancelled")
    for _ in range(3):
        assert running.rest.delete(f"/v1/requests/{request_id}").json()["state"] == "cancelled"
    wait_for(lambda: told(running, request_id)[-1] == "cancelled")
    assert told(running, request_id) == ["accepted", "cancelled"]
    assert counted(running, "requests_total", state="cancelled", code="cancelled") == 1


REFUSED = {
    "no prompt": ({"steps": 2}, "invalid_request", ""),
    "too many steps": ({**BODY, "steps": 10**6}, "invalid_request", "sleeping"),
    "another model": ({**BODY, "model": "none"}, "unknown_model", ""),
}


@pytest.mark.parametrize("path", ["/v1/requests", "/v1/images/generations"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_counted_and_logged(running, path, case):
    body, code, model = REFUSED[case]
    # A body that cannot be read names no model.
    named = {"model": "sleeping"} if model else {}
    before = counted(running, "requests_total", state="refused", code=code, model=model)
    logged = len(lines(running, message="refused", code=code))
    answer = running.rest.post(path, json={**named, **body})
    assert answer.json()["error"]["code"] == code
    assert counted(running, "requests_total", state="refused", code=code, model=model) == before + 1
    assert len(lines(running, message="refused", code=code)) == logged + 1


def test_a_refusal_over_grpc_is_counted_too(running):
    before = counted(running, "requests_total", state="refused", code="invalid_request")
    with Client(f"127.0.0.1:{running.grpc_port}") as client, pytest.raises(InvalidRequest):
        client.generate("", model="sleeping")
    assert counted(running, "requests_total", state="refused", code="invalid_request") == before + 1


def test_paths_that_are_none_make_no_counters_of_their_own(running):
    for number in range(3):
        running.rest.get(f"/nowhere/{number}")
    httpx.request("BREW", f"{running.rest.base_url}/v1/models")
    assert counted(running, "http_responses_total", method="other", route="", status="404") == 3
    assert counted(running, "http_responses_total", method="other", status="405") == 1
    assert "nowhere" not in running.rest.get("/metrics").text


def test_a_request_that_is_too_late_in_its_queue_is_counted_by_one_gateway(tmp_path, one_by_one):
    with (
        sleeping_cluster(tmp_path, one_by_one) as cluster,
        gateway(tmp_path / "one", cluster.redis_url, cluster.addresses) as patient,
        gateway(tmp_path / "two", cluster.redis_url, cluster.addresses, settings=IMPATIENT) as other,
    ):
        patient.rest.post("/v1/requests", json={**BODY, "steps": 200})
        late = other.rest.post("/v1/requests", json=BODY).json()["id"]
        wait_for(lambda: other.rest.get(f"/v1/requests/{late}").json()["state"] == "expired")
        wait_for(lambda: [line for one in (patient, other) for line in lines(one, request_id=late, message="expired")])
        labels = {"state": "expired", "code": "deadline_exceeded"}
        assert sum(counted(one, "requests_total", **labels) for one in (patient, other)) == 1
        assert sum(counted(one, "request_queued_seconds_count") for one in (patient, other)) == 0
