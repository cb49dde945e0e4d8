"""The product as its users meet it: real processes, real Redis, the demo model, the official OpenAI client and ours."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import os
import signal
import threading

import httpx
import numpy as np
import openai
import pytest
import redis
from PIL import Image

from demo.parse import parse
from demo.scorer import score
from protos import gateway_pb2
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


def test_under_a_mask_the_rest_of_the_picture_stays(client, base_url):
    before = client.generate(PROMPT, seed=7).data
    wish = "a large green square above a small blue star on a white background"
    area = np.full((256, 256, 4), 255, np.uint8)
    # The lower half, where the circle is.
    area[128:, :, 3] = 0
    file = io.BytesIO()
    Image.fromarray(area).save(file, "PNG")
    theirs = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
    made = theirs.images.edit(model="demo", prompt=wish, image=before, mask=file.getvalue(), extra_body={"seed": 3})
    after = picture(base64.b64decode(made.data[0].b64_json))
    apart = np.abs(after.astype(int) - picture(before)).mean(axis=(1, 2))
    assert apart[:112].max() < 8 < 16 < apart[144:].max()
    assert score(after, parse(wish)).agrees
    with pytest.raises(openai.BadRequestError, match="or neither: there is only the picture"):
        theirs.images.edit(model="demo", prompt=wish, image=before)


def test_the_openai_client_streams_and_makes_several(base_url):
    theirs = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
    many = theirs.images.generate(model="demo", prompt=PROMPT, n=2, response_format="url", extra_body={"steps": 3})
    urls = [item.url for item in many.data]
    pictures = [httpx.get(url).content for url in urls]
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


def test_a_rank_killed_during_a_step_costs_no_request(rest, client, running_cluster):
    store = running_cluster.run_dir / "artifacts/artifacts"
    undisturbed = [client.generate(PROMPT, seed=seed, width=128, height=128, steps=60).data for seed in range(3)]
    before = {path.name for path in store.iterdir()}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        bodies = [{"prompt": PROMPT, "seed": seed, "size": "128x128", "steps": 60} for seed in range(3)]
        jobs = [pool.submit(rest.post, "/v1/images/generations", json=body) for body in bodies]
        wait_for(lambda: [r for r in client.list(3) if r.state == gateway_pb2.REQUEST_STATE_RUNNING and r.step > 1])
        victim = max(running_cluster.names("dit"), key=lambda name: running_cluster.figures(name)["rank_dit_requests"])
        running_cluster.rank(victim).kill()
        answers = [job.result() for job in jobs]
    assert [answer.status_code for answer in answers] == [200] * 3
    ids = []
    for answer, expected in zip(answers, undisturbed, strict=True):
        [item] = answer.json()["data"]
        ids.append(item["request_id"])
        # The same seed: the same picture, but for the last bit of what another batch rounds.
        difference = picture(base64.b64decode(item["b64_json"])).astype(int) - picture(expected)
        assert np.abs(difference).max() <= 2
        assert [event["state"] for event in statuses(rest, ids[-1])].count("done") == 1
    assert lost_to_a_device(running_cluster) & set(ids), "nobody was disturbed"
    # One artifact a request, with its manifest, and nothing else.
    made = sorted(path.name for path in store.iterdir() if path.name not in before)
    assert sorted(name.split(".")[0] for name in made) == sorted(ids * 2), made
    assert {f"{name}.json" for name in made if not name.endswith(".json")} <= set(made)
    wait_for(lambda: healthy(rest) == 4, 60)
    wait_for(lambda: not running_cluster.leftovers())


def lost_to_a_device(running_cluster) -> set[str]:
    """Requests that gateways have given back because the process that worked on them was gone."""
    logs = (running_cluster.run_dir / "logs").glob("gateway-*.jsonl")
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return {line["request_id"] for line in lines if line["message"].startswith("device_lost at ")}


def statuses(rest: httpx.Client, request_id: str) -> list[dict]:
    blocks = rest.get(f"/v1/requests/{request_id}/events").text.split("\n\n")
    return [json.loads(block.split("data: ")[1]) for block in blocks if "event: status" in block]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_gateway_that_goes_hands_its_requests_over(rest, running_cluster, number):
    """Stopped: at once. Killed: when its leases run out."""
    pid, made = running_cluster.pid("gateway-1"), []
    second = f"http://127.0.0.1:{running_cluster.settings('gateway-1')['gateway']['http_port']}"

    def taken() -> bool:
        """Whether the second gateway has one of the requests, which it mostly has if it got it; if not, one more."""
        if any(owner(running_cluster, one) == pid and state_of(rest, one) == "running" for one in made):
            return True
        made.append(httpx.post(f"{second}/v1/requests", json={"prompt": PROMPT, "steps": 40}).json()["id"])
        return False

    wait_for(taken, every_s=0.1)
    os.kill(pid, number)
    wait_for(lambda: {state_of(rest, one) for one in made} == {"done"}, 60)
    for request_id in made:
        assert [event["state"] for event in statuses(rest, request_id)].count("done") == 1
    assert any("queued" in [event["state"] for event in statuses(rest, one)][1:] for one in made), "nobody moved"
    if number == signal.SIGTERM:
        assert max(rest.get(f"/v1/requests/{one}").json()["attempt"] for one in made) == 1
    # The launcher starts it again.
    wait_for(lambda: running_cluster.pid("gateway-1") not in (0, pid))
    wait_for(lambda: not running_cluster.leftovers())


def owner(running_cluster, request_id: str) -> int:
    """Process id of the gateway that has a request."""
    with redis.Redis.from_url(running_cluster.redis_url) as store:
        name = store.hget(f"{{ll}}:req:{request_id}", "owner") or b"0"
    return int(name.decode().split("/")[0].rsplit("-", 1)[-1])


def test_replicas_join_and_leave_under_load(rest, running_cluster):
    """One of each stage at once. The new ones take requests, and neither their coming nor their going costs one."""
    stop, codes = threading.Event(), []
    before = {stage: len(running_cluster.names(stage)) for stage in ("text_encoder", "dit", "vae")}

    def load() -> None:
        # A pause: the new ones need the cores to start.
        while not stop.wait(0.1):
            body = {"prompt": f"{PROMPT} {len(codes)}", "steps": 2}
            codes.append(rest.post("/v1/images/generations", json=body).status_code)

    def scale(more: int) -> None:
        for stage, count in before.items():
            running_cluster.run(running_cluster.cluster.scale("demo", stage, count + more))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        scale(1)
        wait_for(lambda: healthy(rest) == 7, 60)
        newest = [running_cluster.names(stage)[-1] for stage in before]
        wait_for(lambda: all(calls_of(running_cluster, name) > 0 for name in newest))
        scale(0)
        left = len(codes)
        wait_for(lambda: len(codes) > left + 8)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(codes) == {200}
    assert {stage: len(running_cluster.names(stage)) for stage in before} == before
    wait_for(lambda: healthy(rest) == 4, 60)


def calls_of(running_cluster, name: str) -> float:
    """Calls that a stage process has ended well."""
    port = running_cluster.settings(name)["service"]["metrics_port"]
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text.splitlines()
    ended = [line for line in lines if line.startswith("lightloom_calls_total{") and 'outcome="ok"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in ended if 'method="Describe"' not in line)


def test_numbers_that_no_message_holds_are_refused_by_the_models_limits(rest):
    for name, value, most in (("steps", -1, 200), ("width", 2**32, 1024), ("preview_every", -1, 200)):
        error = rest.post("/v1/requests", json={"prompt": PROMPT, name: value}).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_request", name)
        assert f"{name} is {value}: it must be between" in error["message"] and f"and {most}" in error["message"]


def test_health_metrics_models_and_trace(rest, client):
    assert rest.get("/health").json() == {
        "redis": True,
        "models": {"demo": True},
        "interpolation": False,
        "missing_experts": {},
    }
    assert "lightloom_requests_total{" in rest.get("/metrics").text
    assert rest.get("/").status_code == rest.get("/docs").status_code == rest.get("/openapi.json").status_code == 200
    assert rest.get("/nowhere").json()["error"]["code"] == "unknown_route"
    result = client.generate(PROMPT, steps=2)
    names = {span.name for span in client.trace(result.request_id)}
    assert {"text.encode", "dit.denoise", "vae.decode", "gateway.store"} <= names
