"""API keys, scopes, tenants, quotas and idempotency keys, over REST and gRPC, at two real gateways with one file."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import openai
import pytest

from gateway.keys import ApiKey, create_key, revoke_key
from lightloom import Client
from services.errors import KeyReused, PermissionDenied, QuotaExceeded, Unauthenticated, UnknownRequest
from tests.cluster.gateway_process import ROOT, GatewayProcess, gateway
from tests.cluster.picture_server import PictureServer, picture_server
from tests.cluster.running import wait_for

STAGES = ("text_encoder", "dit", "vae")
BODY = {"prompt": "a red circle", "width": 128, "height": 128, "steps": 2, "seed": 1}
OPTIONS = {"width": 128, "height": 128, "steps": 2, "seed": 1}
LONG = {**BODY, "steps": 60}


@dataclass
class Guarded:
    """Two gateways, the file that both read, and the keys made so far, by name."""

    one: GatewayProcess
    two: GatewayProcess
    file: Path
    pictures: PictureServer
    texts: dict[str, str] = field(default_factory=dict)

    def key(self, name: str, *scopes: str, tenant: str = "", **quotas: float) -> str:
        wish = ApiKey(id="", name=name, tenant=tenant or name, scopes=scopes, sha256="", **quotas)
        self.texts[name] = create_key(self.file, wish)
        return self.texts[name]

    def rest(self, key: str, at: GatewayProcess | None = None) -> httpx.Client:
        base = (at or self.one).rest.base_url
        return httpx.Client(base_url=base, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def grpc(self, key: str) -> Client:
        return Client(f"127.0.0.1:{self.one.grpc_port}", api_key=key)


@pytest.fixture(scope="module")
def guarded(running_cluster, tmp_path_factory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("access")
    file = folder / "keys.jsonl"
    file.write_text("")
    with picture_server() as pictures, _gateways(running_cluster, folder, file, pictures) as made:
        yield made


@contextlib.contextmanager
def _gateways(running_cluster, folder: Path, file: Path, pictures: PictureServer) -> Iterator[Guarded]:
    stages = {stage: running_cluster.address(running_cluster.names(stage)[0]) for stage in STAGES}
    sections = {
        "access": {"keys_file": str(file)},
        "store": {"path": str(running_cluster.run_dir / "artifacts")},
        "inputs": {"image_hosts": [f"http://127.0.0.1:{pictures.port}"], "image_networks": ["127.0.0.0/8"]},
    }
    with (
        gateway(folder / "one", running_cluster.redis_url, stages, settings=sections) as one,
        gateway(folder / "two", running_cluster.redis_url, stages, settings=sections) as two,
    ):
        made = Guarded(one, two, file, pictures)
        made.key("anna", "generate", "read", "abort")
        made.key("bert", "generate", "read", "abort")
        made.key("ops", "read_all")
        yield made
        for text in made.texts.values():
            secret = text.split("_", 2)[2]
            assert secret not in file.read_text() + one.log.read_text() + two.log.read_text()


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_grpc_call_without_a_key_is_refused_before_its_message_is_read(guarded) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{guarded.one.grpc_port}") as channel:
        never = threading.Event()
        for method in ("Generate", "List"):
            # A call whose message does not come.
            call = channel.stream_stream(f"/lightloom.v1.Gateway/{method}")(iter(never.wait, True), timeout=5)
            with pytest.raises(grpc.RpcError) as refused:
                next(call)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        never.set()


def test_without_a_key_nothing_under_v1_answers_and_the_rest_stays_open(guarded) -> None:
    for method, path in [("GET", "/v1/models"), ("GET", "/v1/requests"), ("POST", "/v1/requests"), ("GET", "/v1/x")]:
        answer = guarded.one.rest.request(method, path)
        assert problem(answer) == (401, "unauthenticated")
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/metrics", "/", "/docs", "/openapi.json"):
        assert guarded.one.rest.get(path).status_code == 200, path
    assert problem(guarded.one.rest.get("/v1/requests/x/content")) == (401, "unauthenticated")
    with Client(f"127.0.0.1:{guarded.one.grpc_port}", api_key="") as client:
        with pytest.raises(Unauthenticated, match="Authorization: Bearer KEY"):
            client.models()
        with pytest.raises(Unauthenticated):
            client.generate("a red circle", **OPTIONS)


@pytest.mark.parametrize("wrong", ["Bearer", "Bearer nonsense", "Basic abc", "Bearer ll__", "Bearer ll_ü_ü".encode()])
def test_wrong_credentials_are_refused(guarded, wrong) -> None:
    assert problem(guarded.one.rest.get("/v1/models", headers={"Authorization": wrong})) == (401, "unauthenticated")


def test_an_id_with_another_secret_is_refused(guarded) -> None:
    anna, bert = guarded.texts["anna"].split("_", 2), guarded.texts["bert"].split("_", 2)
    with guarded.rest("_".join([*anna[:2], bert[2]])) as rest:
        assert problem(rest.get("/v1/models")) == (401, "unauthenticated")


def test_a_body_is_not_read_for_a_caller_without_a_key(guarded) -> None:
    with socket.create_connection(("127.0.0.1", guarded.one.http_port), timeout=20) as raw:
        raw.sendall(b"POST /v1/requests HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{")
        assert raw.recv(100).startswith(b"HTTP/1.1 401 ")


def test_others_requests_do_not_exist(guarded) -> None:
    with (
        guarded.rest(guarded.texts["anna"]) as anna,
        guarded.rest(guarded.texts["bert"], at=guarded.two) as bert,
        guarded.rest(guarded.texts["ops"], at=guarded.two) as ops,
        guarded.grpc(guarded.texts["bert"]) as bert_grpc,
    ):
        made = anna.post("/v1/requests", json=BODY)
        assert made.status_code == 202
        request = made.json()["id"]
        wait_for(lambda: anna.get(f"/v1/requests/{request}").json()["state"] == "done", 60)
        for method, path in [("GET", ""), ("GET", "/events"), ("GET", "/content"), ("GET", "/trace"), ("DELETE", "")]:
            refused = bert.request(method, f"/v1/requests/{request}{path}")
            unknown = bert.request(method, f"/v1/requests/nonsense{path}")
            assert problem(refused) == problem(unknown) == (404, "unknown_request"), (method, path)
            assert refused.text.replace(request, "nonsense") == unknown.text
        for ask in (bert_grpc.get, bert_grpc.abort, bert_grpc.trace):
            with pytest.raises(UnknownRequest):
                ask(request)
        assert request in [row["id"] for row in anna.get("/v1/requests").json()["data"]]
        assert request not in [row["id"] for row in bert.get("/v1/requests").json()["data"]]
        assert request not in [row.request_id for row in bert_grpc.list()]
        assert request in [row["id"] for row in ops.get("/v1/requests").json()["data"]]
        assert ops.get(f"/v1/requests/{request}/content").status_code == 200
        assert problem(ops.delete(f"/v1/requests/{request}")) == (403, "permission_denied")


def test_a_tenant_is_seen_by_all_its_keys(guarded) -> None:
    first, second = guarded.key("c1", "generate", tenant="c"), guarded.key("c2", "read", "abort", tenant="c")
    with guarded.rest(first) as maker, guarded.rest(second) as watcher, guarded.grpc(first) as grpc:
        request = maker.post("/v1/requests", json=LONG).json()["id"]
        assert problem(maker.get(f"/v1/requests/{request}")) == (403, "permission_denied")
        assert watcher.delete(f"/v1/requests/{request}").json()["state"] in ("cancelled", "cancelling")
        assert problem(watcher.post("/v1/requests", json=BODY)) == (403, "permission_denied")
        # What a call makes, it may follow, whatever else its key may do.
        assert grpc.generate("a red circle", **OPTIONS).data
        with pytest.raises(PermissionDenied, match="lacks the scope 'read': it has generate"):
            grpc.list()


def test_the_openai_client_works_with_a_key_and_leaving_aborts(guarded) -> None:
    made = openai.OpenAI(base_url=f"{guarded.one.rest.base_url}/v1", api_key=guarded.key("openai", "generate"))
    image = made.images.generate(model="demo", prompt="a red circle", size="128x128", extra_body={"steps": 2})
    assert image.data and image.data[0].b64_json
    with pytest.raises(openai.APITimeoutError):
        made.with_options(timeout=0.5, max_retries=0).images.generate(
            model="demo", prompt="a red circle", size="512x512", extra_body={"steps": 200}
        )
    with guarded.rest(guarded.texts["ops"]) as ops:
        states = ("cancelled", "cancelling")
        wait_for(lambda: ops.get("/v1/requests", params={"limit": 1}).json()["data"][0]["state"] in states, 30)


def test_keys_come_and_go_while_gateways_run(guarded) -> None:
    text = guarded.key("guest", "read")
    for at in (guarded.one, guarded.two):
        with guarded.rest(text, at) as rest:
            assert rest.get("/v1/models").status_code == 200
    revoke_key(guarded.file, "guest")
    for at in (guarded.one, guarded.two):
        with guarded.rest(text, at) as rest:
            assert problem(rest.get("/v1/models")) == (401, "unauthenticated")
    kept = guarded.file.read_text()
    guarded.file.write_text(kept + "no key\n")
    with guarded.rest(guarded.texts["anna"]) as rest:
        assert rest.get("/v1/models").status_code == 200
    assert "the API keys stay as they were" in guarded.one.log.read_text()
    guarded.file.write_text(kept)


def test_the_rate_of_a_key_counts_at_all_gateways_together(guarded) -> None:
    text = guarded.key("rated", "generate", "abort", requests_per_minute=4)
    with guarded.rest(text) as one, guarded.rest(text, at=guarded.two) as two, guarded.grpc(text) as grpc:
        answers = [rest.post("/v1/requests", json=BODY) for rest in (one, two, one, two)]
        assert [answer.status_code for answer in answers] == [202] * 4
        refused = two.post("/v1/requests", json=BODY)
        assert problem(refused) == (429, "quota_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 15
        assert "has used its 4 requests a minute: try again in" in refused.json()["error"]["message"]
        with pytest.raises(QuotaExceeded) as error:
            grpc.generate("a red circle", **OPTIONS)
        assert 0 < error.value.retry_after_s <= 15
        # What is refused for its values costs nothing, and neither does what is refused for its cost.
        assert problem(one.post("/v1/requests", json={**BODY, "steps": 5000})) == (400, "invalid_request")


def test_the_cost_of_requests_is_counted(guarded) -> None:
    # 128 * 128 * 2 steps are 0.032768 megapixel-steps.
    text = guarded.key("thrifty", "generate", cost_per_hour=0.07)
    with guarded.rest(text) as rest:
        assert [rest.post("/v1/requests", json=BODY).status_code for _ in range(2)] == [202, 202]
        refused = rest.post("/v1/requests", json=BODY)
        assert problem(refused) == (429, "quota_exceeded")
        assert 1000 < int(refused.headers["retry-after"]) < 1600
        never = rest.post("/v1/requests", json=LONG)
        assert problem(never) == (429, "quota_exceeded") and "retry-after" not in never.headers
        assert "may never use more than its 0.07 an hour at once" in never.json()["error"]["message"]


def test_an_idempotency_key_is_the_tenants_own(guarded) -> None:
    text = guarded.key("again", "generate", "read", requests_per_minute=3)
    headers = {"Idempotency-Key": "order-1"}
    unseeded = {name: value for name, value in BODY.items() if name != "seed"}
    with guarded.rest(text) as one, guarded.rest(text, at=guarded.two) as two, guarded.grpc(text) as grpc:
        request = one.post("/v1/requests", json=unseeded, headers=headers).json()["id"]
        # The same again is the same request, and is not counted.
        for rest in (two, one, two, one):
            answer = rest.post("/v1/requests", json=unseeded, headers=headers)
            assert (answer.status_code, answer.json()["id"]) == (202, request)
        options = {name: value for name, value in OPTIONS.items() if name != "seed"}
        assert grpc.submit("a red circle", idempotency_key="order-1", **options) == request
        for other in ({**unseeded, "prompt": "a blue star"}, {**unseeded, "priority": 1}, BODY):
            refused = two.post("/v1/requests", json=other, headers=headers)
            assert problem(refused) == (409, "idempotency_key_reused")
            assert request in refused.json()["error"]["message"]
        with pytest.raises(KeyReused, match="another body"):
            grpc.submit("a blue star", idempotency_key="order-1", **options)
        with guarded.rest(guarded.texts["anna"]) as anna:
            own = anna.post("/v1/requests", json={**unseeded, "prompt": "a blue star"}, headers=headers)
            assert own.status_code == 202 and own.json()["id"] != request
        # Many at once make one, and the others get their share of the quota back.
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            sends = [
                pool.submit(one.post, "/v1/requests", json=BODY, headers={"Idempotency-Key": "2"}) for _ in range(3)
            ]
            answers = [send.result() for send in sends]
        assert len({answer.json()["id"] for answer in answers if answer.status_code == 202}) == 1


def test_pictures_by_url_are_fetched_for_who_may_use_them(guarded) -> None:
    url = f"http://127.0.0.1:{guarded.pictures.port}/a.png"
    with guarded.rest(guarded.texts["anna"]) as maker, guarded.rest(guarded.texts["ops"]) as watcher:
        for path, body in (
            ("/v1/requests", {**BODY, "inputs": [{"data_url": url}]}),
            ("/v1/images/generations", {"prompt": "a red circle", "input_image": url}),
        ):
            assert problem(watcher.post(path, json=body)) == (403, "permission_denied")
            assert not guarded.pictures.asked
            # It is fetched, and then the model, which takes no pictures, is asked.
            answer = maker.post(path, json=body)
            assert answer.json()["error"]["param"] == "inputs" and guarded.pictures.asked == [(url[7:-6], "/a.png")]
            guarded.pictures.asked.clear()
        for wrong in ("http://127.0.0.1:1/a.png", "https://example.com/a.png"):
            answer = maker.post("/v1/requests", json={**BODY, "inputs": [{"data_url": wrong}]})
            assert problem(answer) == (400, "invalid_request")
            assert "where this gateway fetches nothing" in answer.json()["error"]["message"]


def test_the_cli_sends_the_key_of_its_environment(guarded, tmp_path, monkeypatch) -> None:
    command = [sys.executable, "-m", "lightloom", "generate", "a red circle", "-o", str(tmp_path / "o.png")]
    command += ["--size", "128x128", "--steps", "2", "--address", f"127.0.0.1:{guarded.one.grpc_port}"]
    monkeypatch.delenv("LIGHTLOOM_API_KEY", raising=False)
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 1 and "error: an API key is needed" in refused.stderr
    monkeypatch.setenv("LIGHTLOOM_API_KEY", guarded.texts["anna"])
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
