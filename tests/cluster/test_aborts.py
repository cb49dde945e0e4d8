"""Aborts: from every side, in every state; work stops at once and nothing stays behind."""

from __future__ import annotations

import contextlib
import signal
import socket
import statistics
import time
import uuid
from collections.abc import Callable, Iterator

import grpc
import httpx
import pytest

from benchmarks.aborts import abort_many, denoisers_of
from lightloom import AsyncClient
from protos import gateway_pb2, gateway_pb2_grpc, types_pb2
from tests.cluster.running import RunningCluster, wait_for

STEPS = 200


class Wanted:
    """A request that somebody waits for, and the ways to be rid of it."""

    def __init__(self, running: RunningCluster, steps: int) -> None:
        self.prompt = f"a cat {uuid.uuid4().hex}"
        self.steps = steps
        self.running = running
        self.rest = httpx.Client(base_url=running.base_url, timeout=30)
        self.channel = grpc.insecure_channel(running.cluster.grpc_address)
        self.stub = gateway_pb2_grpc.GatewayStub(self.channel)
        self.request_id = ""

    def found(self) -> str:
        """The request's id, once the cluster has it."""

        def look() -> str:
            listed = self.rest.get("/v1/requests", params={"limit": 50}).json()["data"]
            return next((item["id"] for item in listed if item["params"]["prompt"] == self.prompt), "")

        self.request_id = wait_for(look)
        return self.request_id

    def record(self) -> dict:
        return self.rest.get(f"/v1/requests/{self.request_id}").json()

    def body(self) -> dict:
        return {"prompt": self.prompt, "steps": self.steps}

    # Each route: asks for the picture, gives control to the test, then is rid of the request.

    @contextlib.contextmanager
    def grpc_cancel(self) -> Iterator[None]:
        params = types_pb2.GenerationParams(prompt=self.prompt, steps=self.steps)
        call = self.stub.Generate(gateway_pb2.GenerateRequest(params=params), timeout=60)
        yield
        call.cancel()

    @contextlib.contextmanager
    def abort_rpc(self) -> Iterator[None]:
        self.rest.post("/v1/requests", json=self.body())
        yield
        answer = self.stub.Abort(gateway_pb2.AbortRequest(request_id=self.request_id), timeout=10)
        assert answer.state in (gateway_pb2.REQUEST_STATE_CANCELLED, gateway_pb2.REQUEST_STATE_CANCELLING)

    @contextlib.contextmanager
    def rest_delete(self) -> Iterator[None]:
        self.rest.post("/v1/requests", json=self.body())
        yield
        assert self.rest.delete(f"/v1/requests/{self.request_id}").json()["state"] in ("cancelled", "cancelling")

    @contextlib.contextmanager
    def disconnect(self) -> Iterator[None]:
        with self._waiting_call(self.body()):
            yield

    @contextlib.contextmanager
    def stream_disconnect(self) -> Iterator[None]:
        with self._waiting_call({**self.body(), "stream": True}):
            yield

    @contextlib.contextmanager
    def _waiting_call(self, body: dict) -> Iterator[None]:
        request = self.rest.build_request("POST", "/v1/images/generations", json=body)
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        host, port = self.running.cluster.http_address.split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
            yield

    def close(self) -> None:
        self.rest.close()
        self.channel.close()


ROUTES = (Wanted.grpc_cancel, Wanted.abort_rpc, Wanted.rest_delete, Wanted.disconnect, Wanted.stream_disconnect)


@pytest.fixture
def wanted(running_cluster) -> Iterator[Callable[[int], Wanted]]:
    made: list[Wanted] = []

    def make(steps: int = STEPS) -> Wanted:
        made.append(Wanted(running_cluster, steps))
        return made[-1]

    yield make
    for item in made:
        item.close()
    wait_for(lambda: not running_cluster.leftovers())


@contextlib.contextmanager
def frozen(running: RunningCluster, stage: str) -> Iterator[None]:
    """The ranks of a stage stand still meanwhile, so that requests stay in that stage."""
    ranks = [running.rank(name) for name in running.names(stage)]
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def without(running: RunningCluster, stage: str) -> Iterator[None]:
    """No replica of a stage is there meanwhile, so that requests wait for one in the queue."""
    running.run(running.cluster.scale("demo", stage, 0))
    try:
        yield
    finally:
        running.run(running.cluster.scale("demo", stage, 1))
        wait_for(lambda: httpx.get(f"{running.base_url}/health").status_code == 200, 60)


def check_cancelled(item: Wanted, within_s: float = 2.0) -> None:
    wait_for(lambda: item.record()["state"] == "cancelled", within_s)
    record = item.record()
    assert record["artifact"] is None
    assert item.rest.get(f"/v1/requests/{item.request_id}/content").status_code == 409


def check_all_cancelled(items: list[Wanted], within_s: float = 3.0) -> None:
    """Those that were stored before their callers left; how many that is, nobody knows."""
    prompts, rest = {item.prompt for item in items}, items[0].rest

    def states() -> set[str]:
        listed = rest.get("/v1/requests", params={"limit": 200}).json()["data"]
        return {one["state"] for one in listed if one["params"]["prompt"] in prompts}

    # The last submits may still be under way.
    time.sleep(0.5)
    wait_for(lambda: states() == {"cancelled"}, within_s)


every_route = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)


class TestQueued:
    """Requests that wait for a text encoder."""

    @pytest.fixture(scope="class", autouse=True)
    def no_encoder(self, running_cluster):
        with without(running_cluster, "text_encoder"):
            yield

    @every_route
    def test_a_request_that_waits(self, wanted, route):
        item = wanted()
        with route(item):
            item.found()
            assert item.record()["state"] == "queued"
        check_cancelled(item)


@every_route
def test_a_request_whose_prompt_is_being_encoded(running_cluster, wanted, route):
    with frozen(running_cluster, "text_encoder"):
        item = wanted()
        with route(item):
            item.found()
            wait_for(lambda: item.record()["state"] == "running")
        check_cancelled(item)


@every_route
def test_a_request_that_is_denoised(running_cluster, wanted, route):
    item = wanted()
    with route(item):
        item.found()
        wait_for(lambda: item.record()["step"] > 2)
    check_cancelled(item)
    wait_for(lambda: not running_cluster.leftovers(), 2.0)
    before = running_cluster.steps()
    time.sleep(0.5)
    assert running_cluster.steps() == before


@every_route
def test_a_request_that_is_decoded(running_cluster, wanted, route):
    with frozen(running_cluster, "vae"):
        item = wanted(2)
        with route(item):
            item.found()
            wait_for(lambda: item.record()["stage"] == "vae")
        check_cancelled(item)


def test_a_request_that_waits_for_its_decoder(running_cluster, wanted):
    """Its latents are in the store then, and must not stay there."""
    with without(running_cluster, "vae"):
        item = wanted(2)
        with item.rest_delete():
            item.found()
            wait_for(lambda: (item.record()["state"], item.record()["stage"]) == ("queued", "vae"))
            assert list(running_cluster.run_dir.glob("artifacts/latents/*"))
        check_cancelled(item)
        wait_for(lambda: not list(running_cluster.run_dir.glob("artifacts/latents/*")))


@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.005])
@pytest.mark.parametrize("route", [Wanted.disconnect, Wanted.stream_disconnect], ids=lambda route: route.__name__)
def test_a_client_that_leaves_at_once(wanted, route, after_s):
    items = [wanted() for _ in range(10)]
    for item in items:
        with route(item):
            time.sleep(after_s)
    check_all_cancelled(items)


def test_a_call_that_is_cancelled_while_it_submits(wanted):
    """No claim is left without an owner: such a one would hold its slot until the lease ends, after 10 s."""
    items = [wanted() for _ in range(60)]
    for number, item in enumerate(items):
        with item.grpc_cancel():
            time.sleep(0.001 + number % 10 * 0.0015)
    check_all_cancelled(items)


def test_ended_requests_stay_as_they_are(running_cluster, wanted):
    item = wanted(2)
    made = item.rest.post("/v1/images/generations", json=item.body())
    assert made.status_code == 200
    item.found()
    assert item.rest.delete(f"/v1/requests/{item.request_id}").json()["state"] == "done"
    assert item.rest.get(f"/v1/requests/{item.request_id}/content").status_code == 200
    assert item.rest.delete("/v1/requests/none").status_code == 404


async def test_work_stops_within_a_step_and_200_ms_and_memory_stays(running_cluster):
    """`benchmarks/aborts.py` does the same 300 times."""
    async with AsyncClient(running_cluster.cluster.grpc_address) as client:
        seen = await abort_many(client, denoisers_of(running_cluster.cluster), 30, timed_every=6)
    # The median: on a busy machine a single one may wait for the processor.
    assert statistics.median(seen.late_s) <= 0.2, seen.late_s
    assert seen.growth(10, 30) <= 0.02, seen.resident
    assert seen.live_tensors_left == 0
