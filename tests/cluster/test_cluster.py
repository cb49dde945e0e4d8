"""The product as its users meet it: real processes, real Redis, the demo model, the official OpenAI client and ours."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import os
import signal
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from demo.parse import parse
from demo.scorer import score
from protos import gateway_pb2
from services.errors import InvalidRequest, ServiceError, UnknownModel, UnknownRequest
from tests.cluster.running import wait_for

PROMPT = "a large green square above a small red circle on a white background"


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def event_ids(lines: list[str]) -> list[str]:
    return [line.split("\n")[0].removeprefix("id: ") for line in lines if line]


def healthy(rest: httpx.Client) -> int:
    return sum(replica["healthy"] for replica in rest.get("/v1/models").json()["data"][0]["replicas"])


def state_of(rest: httpx.Client, request_id: str) -> str:
    return rest.get(f"/v1/requests/{request_id}").json()["state"]


def test_the_picture_shows_what_the_prompt_says(client):
    seen = []
    result = client.generate(PROMPT, model="demo", seed=7, on_progress=seen.append)
    assert score(picture(result.data), parse(PROMPT)).agrees
    assert (result.width, result.height, result.mime) == (256, 256, "image/png")
    assert set(result.busy_s) == {"text_encoder", "dit", "vae"}
    assert [event.state for event in seen][-1] == "done"
    assert max(event.step for event in seen) == 20


def test_the_same_seed_gives_the_same_picture_through_rest_and_grpc(client, base_url):
    ours = client.generate(PROMPT, seed=11, steps=4).data
    theirs = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
    answer = theirs.images.generate(model="demo", prompt=PROMPT, size="256x256", extra_body={"seed": 11, "steps": 4})
    assert base64.b64decode(answer.data[0].b64_json) == ours


def test_the_openai_client_streams_and_makes_several(base_url):
    theirs = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
    many = theirs.images.generate(model="demo", prompt=PROMPT, n=2, response_format="url", extra_body={"steps": 3})
    urls = [item.url for item in many.data]
    pictures = [httpx.get(base_url + url).content for url in urls]
    assert pictures[0] != pictures[1]
    events = list(theirs.images.generate(model="demo", prompt=PROMPT, stream=True, extra_body={"steps": 4}))
    assert events[-1].type == "image_generation.completed"
    assert picture(base64.b64decode(events[-1].b64_json)).shape == (256, 256, 3)


def test_events_can_be_resumed_through_the_other_gateway(rest, running_cluster):
    made = rest.post("/v1/requests", json={"prompt": PROMPT, "steps": 3}).json()
    lines = rest.get(f"/v1/requests/{made['id']}/events").text.split("\n\n")
    ids = event_ids(lines)
    assert json.loads(lines[-2].split("data: ")[1])["state"] == "done"
    config = (running_cluster.cluster.run_dir / "config/gateway-1.toml").read_text()
    port = next(line.split("=")[1].strip() for line in config.splitlines() if line.startswith("http_port"))
    other = httpx.get(f"http://127.0.0.1:{port}/v1/requests/{made['id']}/events", headers={"Last-Event-ID": ids[1]})
    assert event_ids(other.text.split("\n\n")) == ids[2:]


def test_queued_and_running_requests_can_be_aborted(rest):
    made = [rest.post("/v1/requests", json={"prompt": PROMPT, "steps": 200}).json()["id"] for _ in range(3)]
    wait_for(lambda: state_of(rest, made[0]) == "running")
    for request_id in made:
        rest.delete(f"/v1/requests/{request_id}")
    for request_id in made:
        wait_for(lambda request_id=request_id: state_of(rest, request_id) == "cancelled")
    wait_for(lambda: all(r["in_flight"] == 0 for r in rest.get("/v1/models").json()["data"][0]["replicas"]))


def test_a_client_that_leaves_aborts_its_request(rest):
    with pytest.raises(httpx.ReadTimeout):
        rest.post("/v1/images/generations", json={"prompt": PROMPT, "steps": 200}, timeout=1.0)
    newest = rest.get("/v1/requests", params={"limit": 1}).json()["data"][0]["id"]
    wait_for(lambda: state_of(rest, newest) == "cancelled")


def test_a_killed_rank_costs_no_request(rest, client, running_cluster):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(rest.post, "/v1/images/generations", json={"prompt": PROMPT, "steps": 120, "seed": i})
            for i in range(2)
        ]
        wait_for(lambda: [r for r in client.list(2) if r.state == gateway_pb2.REQUEST_STATE_RUNNING and r.step > 1])
        running_cluster.rank(running_cluster.names("dit")[0]).kill()
        answers = [job.result() for job in jobs]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert {len(answer.json()["data"]) for answer in answers} == {1}
    wait_for(lambda: healthy(rest) == 4, 60)


def test_replicas_join_and_leave_under_load(rest, running_cluster):
    stop, codes = threading.Event(), []

    def load() -> None:
        while not stop.is_set():
            codes.append(rest.post("/v1/images/generations", json={"prompt": PROMPT, "steps": 2}).status_code)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        running_cluster.run(running_cluster.cluster.scale("demo", "vae", 2))
        wait_for(lambda: healthy(rest) == 5, 60)
        running_cluster.run(running_cluster.cluster.scale("demo", "vae", 1))
    finally:
        stop.set()
        thread.join()
    assert set(codes) == {200}


BAD = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": "x" * 9000}, "at most 8000"),
    ({"prompt": 5}, "must be a string"),
    ({"prompt": "a", "size": "100x256"}, "not a multiple of 16"),
    ({"prompt": "a", "size": "8192x8192"}, "between 64 and 1024"),
    ({"prompt": "a", "size": "256*256"}, "WIDTHxHEIGHT"),
    ({"prompt": "a", "steps": 0}, "steps"),
    ({"prompt": "a", "steps": 10**6}, "between 1 and 200"),
    ({"prompt": "a", "guidance": "high"}, "must be a number"),
    ({"prompt": "a", "n": 1000}, "n is 1000"),
    ({"prompt": "a", "colour": "red"}, "unknown field 'colour'"),
    ({"prompt": "a", "image": "data:image/png;base64,AAAA"}, "no known type"),
]


@pytest.mark.parametrize(("body", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_bodies_are_refused_with_what_is_allowed(rest, body, text):
    answer = rest.post("/v1/images/generations", json={"model": "demo", **body})
    assert answer.status_code == 400, answer.text
    assert text in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "status", "text"),
    [
        (b'{"prompt": ', 400, "not valid JSON"),
        (b'{"prompt": "a", "guidance": NaN}', 400, "guidance"),
        (b'["a"]', 400, "JSON object"),
        (b'{"prompt": "a", "model": "none"}', 404, "there are demo"),
        (b'{"prompt": "' + b"a" * 13_000_000 + b'"}', 413, "too large"),
    ],
    ids=["cut", "nan", "list", "model", "large"],
)
def test_bad_bytes_are_refused(rest, content, status, text):
    answer = rest.post("/v1/images/generations", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert text in answer.json()["error"]["message"]


def test_bad_requests_over_grpc(client):
    for options in ({"steps": 0}, {"steps": 10**6}, {"guidance": float("nan")}, {"width": 100}):
        with pytest.raises(InvalidRequest):
            client.generate("a cat", **options)
    with pytest.raises(UnknownModel):
        client.generate("a cat", model="none")
    with pytest.raises(UnknownRequest):
        client.get("none")
    with pytest.raises(InvalidRequest, match="at least 2"):
        client.generate("a cat", steps=1)
    assert client.generate("a cat", steps=2).data


def test_health_metrics_models_and_trace(rest, client):
    assert rest.get("/health").json() == {"redis": True, "models": {"demo": True}}
    assert "python_info" in rest.get("/metrics").text
    assert rest.get("/").status_code == rest.get("/docs").status_code == rest.get("/openapi.json").status_code == 200
    assert rest.get("/nowhere").json()["error"]["code"] == "unknown_route"
    result = client.generate(PROMPT, steps=2)
    names = {span.name for span in client.trace(result.request_id)}
    assert {"text.encode", "dit.denoise", "vae.decode", "gateway.store"} <= names


def test_redis_away_for_a_moment_costs_no_running_request(client, running_cluster):
    server = running_cluster.cluster._redis.process
    with concurrent.futures.ThreadPoolExecutor() as pool:
        job = pool.submit(client.generate, PROMPT, steps=100)
        time.sleep(1.0)
        os.kill(server.pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(server.pid, signal.SIGCONT)
        try:
            assert job.result(60).data
        except ServiceError as error:
            raise AssertionError(f"the request was lost: {error}") from error
