"""Artifacts of real gateways: links, ranges, S3 shared by two, a store that is full or away, the sweep."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import psutil
import pytest
import redis

from gateway.digests import CHUNK_BYTES, Digests
from gateway.store import manifest_of
from lightloom.cluster_config import write_toml
from protos import gateway_pb2
from services.config import environment_with_malloc
from services.free_port import free_port
from tests.cluster.gateway_process import ROOT, GatewayProcess, gateway
from tests.cluster.redis_process import own_redis
from tests.cluster.running import RunningCluster, wait_for
from tests.cluster.s3_process import ENVIRONMENT, SECRET, S3Process, s3_server

STAGES = ("text_encoder", "dit", "vae")
BODY = {"prompt": "a red circle", "steps": 4, "width": 128, "height": 128}
LONG = {**BODY, "steps": 60}
IMAGE = {"prompt": "a red circle", "steps": 4, "size": "128x128", "response_format": "url"}


@pytest.fixture(scope="module")
def honest(running_cluster: RunningCluster) -> dict[str, str]:
    return {stage: running_cluster.address(running_cluster.names(stage)[0]) for stage in STAGES}


@pytest.fixture
def redis_url(tmp_path) -> Iterator[str]:
    with own_redis(tmp_path) as url:
        yield url


def submit(running: GatewayProcess, body: dict) -> str:
    made = running.rest.post("/v1/requests", json=body)
    assert made.status_code == 202, made.text
    return made.json()["id"]


def status(running: GatewayProcess, request_id: str) -> dict:
    return running.rest.get(f"/v1/requests/{request_id}").json()


def done(running: GatewayProcess, request_id: str) -> dict:
    """The request, once it is done."""
    wait_for(lambda: status(running, request_id)["state"] in ("done", "failed"), 120)
    ended = status(running, request_id)
    assert ended["state"] == "done", ended
    return ended


def code(answer) -> str:
    return answer.json()["error"]["code"]


def figures(running: GatewayProcess) -> dict[str, float]:
    lines = running.rest.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("lightloom_")}


class Two:
    """Two gateways on one Redis and one bucket."""

    def __init__(self, s3: S3Process, redis_url: str, first: GatewayProcess, second: GatewayProcess) -> None:
        self.s3, self.redis_url, self.first, self.second = s3, redis_url, first, second


@pytest.fixture(scope="module")
def two(honest, tmp_path_factory) -> Iterator[Two]:
    folder = tmp_path_factory.mktemp("two")
    with s3_server(folder) as s3, own_redis(folder) as redis_url:
        options = {"settings": {"store": {"path": s3.path, "endpoint_url": s3.url}}, "environment": ENVIRONMENT}
        with (
            gateway(folder / "first", redis_url, honest, **options) as first,
            gateway(folder / "second", redis_url, honest, **options) as second,
        ):
            yield Two(s3, redis_url, first, second)
        for running in (first, second):
            text = running.log.read_text()
            assert SECRET not in text and ENVIRONMENT["AWS_ACCESS_KEY_ID"] not in text


def test_what_one_gateway_put_into_s3_another_serves(two) -> None:
    made = two.first.rest.post("/v1/images/generations", json=IMAGE)
    assert made.status_code == 200, made.text
    [item] = made.json()["data"]
    stored = [name for name in two.s3.names() if item["request_id"] in name]
    data, manifest = two.s3.get(stored[0]), json.loads(two.s3.get(stored[1]))
    assert [name.rpartition(".")[2] == "json" for name in stored] == [False, True]
    assert manifest["sha256"] == hashlib.sha256(data).hexdigest() and manifest["width"] == 128
    for running in (two.first, two.second):
        check_content(running, item["url"], data)
    assert status(two.second, item["request_id"])["artifact"]["sha256"] == manifest["sha256"]


def check_content(running: GatewayProcess, url: str, data: bytes) -> None:
    """The whole of it, parts of it, and none of it."""
    whole = running.rest.get(url)
    assert (whole.status_code, whole.content) == (200, data)
    etag = whole.headers["etag"]
    assert etag == f'"{hashlib.sha256(data).hexdigest()}"'
    assert (whole.headers["accept-ranges"], whole.headers["x-content-type-options"]) == ("bytes", "nosniff")
    head = running.rest.head(url)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(data)))
    for wanted, part in (("bytes=0-9", data[:10]), ("bytes=-7", data[-7:]), ("bytes=100-", data[100:])):
        answer = running.rest.get(url, headers={"Range": wanted})
        assert (answer.status_code, answer.content) == (206, part)
        start = data.index(part) if part != data[-7:] else len(data) - 7
        assert answer.headers["content-range"] == f"bytes {start}-{start + len(part) - 1}/{len(data)}"
    behind = running.rest.get(url, headers={"Range": f"bytes={len(data)}-"})
    assert (behind.status_code, behind.headers["content-range"]) == (416, f"bytes */{len(data)}")
    assert code(behind) == "range_not_satisfiable"
    assert running.rest.get(url, headers={"Range": "bytes=0-9", "If-Range": '"other"'}).content == data
    assert running.rest.get(url, headers={"Range": "bytes=0-9", "If-Range": etag}).content == data[:10]
    for known in (etag, "*"):
        assert running.rest.get(url, headers={"If-None-Match": known}).status_code == 304


def test_links_are_checked_and_a_damaged_artifact_is_told(two) -> None:
    ended = done(two.first, submit(two.first, BODY))
    url, request_id = ended["artifact"]["url"], ended["id"]
    path, query = url.split("?")
    assert re.fullmatch(r"expires=[0-9]{10}&signature=[0-9a-f]{64}", query)
    other_hex = url[:-1] + ("0" if url[-1] != "0" else "1")
    for wrong in (other_hex, f"{path}?expires=9999999999", url.replace("expires=1", "expires=2")):
        refused = two.second.rest.get(wrong)
        assert (refused.status_code, code(refused)) == (403, "link_refused"), wrong
    # Without access keys a gateway listens on loopback only, and a link needs no signature.
    assert two.second.rest.get(path).status_code == 200
    [name] = [name for name in two.s3.names() if request_id in name and not name.endswith(".json")]
    good = two.s3.get(name)
    for bad in (good[:-1], good[:50] + b"\x00" + good[51:], good + b"x"):
        two.s3.put(name, bad)
        answer = two.second.rest.get(url)
        assert (answer.status_code, code(answer)) == (502, "corrupt_artifact"), answer.text
        ranged = two.second.rest.get(url, headers={"Range": "bytes=0-9"})
        assert ranged.status_code == 502
    two.s3.delete(name)
    assert (two.second.rest.get(url).status_code, two.second.rest.head(url).status_code) == (409, 409)
    two.s3.put(name, good)
    assert two.second.rest.get(url).content == good


def test_a_large_artifact_that_is_damaged_behind_its_start_breaks_off(two) -> None:
    request_id = done(two.first, submit(two.first, BODY))["id"]
    data = bytes(range(256)) * (2 * CHUNK_BYTES // 256) + b"the end"
    artifact = gateway_pb2.Artifact(mime="video/raw", nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    with redis.Redis.from_url(two.redis_url) as administrator:
        key = f"{{ll}}:req:{request_id}"
        name = administrator.hget(key, "file").decode()
        administrator.hset(key, "artifact", artifact.SerializeToString())
    two.s3.put(f"artifacts/{name}", data)
    two.s3.put(f"artifacts/{name}.json", manifest_of(name, artifact, Digests.of(data).ended()[1]))
    url = status(two.second, request_id)["artifact"]["url"]
    check_content(two.second, url, data)
    two.s3.put(f"artifacts/{name}", data[:-1] + b"D")
    # What is whole is given, whoever asks for the rest hears of it, and nobody takes the whole for good.
    assert two.second.rest.get(url, headers={"Range": "bytes=5-9"}).content == data[5:10]
    assert two.second.rest.get(url, headers={"Range": "bytes=-1"}).status_code == 502
    with pytest.raises(httpx.RemoteProtocolError):
        two.second.rest.get(url)


@contextmanager
def denying(s3: S3Process) -> Iterator[None]:
    s3.deny(True)
    try:
        yield
    finally:
        s3.deny(False)


@contextmanager
def killed(s3: S3Process) -> Iterator[None]:
    """It comes back with an empty bucket."""
    s3.kill()
    try:
        yield
    finally:
        s3.start()


@pytest.mark.parametrize(("trouble", "text"), [(denying, "denies access"), (killed, "does not answer")])
def test_a_bucket_that_is_away_costs_no_request(two, trouble, text: str) -> None:
    request_id = submit(two.first, LONG)
    wait_for(lambda: status(two.first, request_id)["step"] > 1, 60)
    with trouble(two.s3):
        refusing = wait_for(lambda: refused_by_one_of((two.first, two.second)), 120)
        answer = refusing.rest.post("/v1/requests", json=BODY)
        assert (answer.status_code, code(answer)) == (503, "artifact_store_down")
        assert text in answer.text and int(answer.headers["retry-after"]) > 0
        assert status(two.first, request_id)["state"] in ("running", "queued")
    made = done(two.first, request_id)
    content = two.second.rest.get(made["artifact"]["url"]).content
    assert hashlib.sha256(content).hexdigest() == made["artifact"]["sha256"]
    wait_for(lambda: refused_by_one_of((two.first, two.second)) is None)
    done(refusing, submit(refusing, BODY))
    # Neither latents nor probes are left.
    wait_for(lambda: all(name.startswith("artifacts/") for name in two.s3.names()))


def refused_by_one_of(gateways: tuple[GatewayProcess, ...]) -> GatewayProcess | None:
    """The one that had the request, and so knows."""
    return next((one for one in gateways if figures(one)["lightloom_store_refusing"]), None)


@contextmanager
def full_disk(running: GatewayProcess) -> Iterator[None]:
    """No file of the gateway may grow beyond 1 kB: the kernel refuses the rest of a write, as on a full disk.

    The smallest pictures here have 1.3 kB.
    """
    process = psutil.Process(running.process.pid)
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, before)


def test_a_full_disk_refuses_new_work_and_loses_none(honest, redis_url, tmp_path) -> None:
    with gateway(tmp_path / "gateway", redis_url, honest) as running:
        ids = [submit(running, LONG) for _ in range(3)]
        wait_for(lambda: status(running, ids[0])["step"] > 1, 60)
        with full_disk(running):
            wait_for(lambda: figures(running)["lightloom_store_refusing"], 60)
            for answer in (
                running.rest.post("/v1/requests", json=BODY),
                running.rest.post("/v1/images/generations", json=IMAGE),
            ):
                assert (answer.status_code, code(answer)) == (507, "artifact_store_full")
                assert int(answer.headers["retry-after"]) > 0
            # An abort is no write.
            aborted = submit_aborted(running, ids.pop())
            assert aborted == "cancelled"
            time.sleep(2)
            assert {status(running, one)["state"] for one in ids} <= {"running", "queued"}
            assert [path for path in running.store.rglob("*") if path.is_file()] == []
        for one in ids:
            ended = done(running, one)
            assert running.rest.get(ended["artifact"]["url"]).status_code == 200
        assert done(running, submit(running, BODY))
        names = sorted(path.name for path in running.store.rglob("*") if path.is_file())
        assert len(names) == 6 and not any(name.endswith(".part") for name in names), names


def submit_aborted(running: GatewayProcess, request_id: str) -> str:
    running.rest.delete(f"/v1/requests/{request_id}")
    wait_for(lambda: status(running, request_id)["state"] != "cancelling")
    return status(running, request_id)["state"]


def test_a_request_that_finds_no_room_in_its_time_says_so(honest, redis_url, tmp_path) -> None:
    # Long enough to be denoised on a machine that stands still for seconds: then there is something to store.
    settings = {"gateway": {"request_timeout_s": 20.0}}
    with gateway(tmp_path / "gateway", redis_url, honest, settings=settings) as running, full_disk(running):
        request_id = submit(running, BODY)
        wait_for(lambda: status(running, request_id)["state"] not in ("queued", "running"), 90)
        ended = status(running, request_id)
        assert (ended["state"], ended["error"]["code"]) == ("failed", "artifact_store_full"), ended
        assert "full" in ended["error"]["message"]
        assert [path for path in running.store.rglob("*") if path.is_file()] == []


def test_two_gateways_sweep_one_folder(honest, redis_url, tmp_path) -> None:
    store = tmp_path / "store"
    settings = {
        "store": {"path": str(store), "sweep_s": 0.3, "sweep_age_s": 1.0, "link_s": 1.0},
    }
    with (
        gateway(tmp_path / "first", redis_url, honest, settings=settings) as first,
        gateway(tmp_path / "second", redis_url, honest, settings=settings) as second,
    ):
        ended = done(first, submit(first, BODY))
        files = {path.name for path in (store / "artifacts").iterdir()}
        assert len(files) == 2
        for name in ("artifacts/.dead.1.0a1b.part", f"artifacts/{ended['id']}.0", "latents/" + ended["id"]):
            (store / name).write_bytes(b"left behind")
        wait_for(lambda: not list((store / "latents").iterdir()), 15)
        wait_for(lambda: {path.name for path in (store / "artifacts").iterdir()} == files, 15)
        assert second.rest.get(f"/v1/requests/{ended['id']}/content").status_code == 200
        wait_for(lambda: figures(second).get('lightloom_store_files{kind="artifacts"}') == 2)
        wait_for(lambda: second.rest.get(ended["artifact"]["url"]).status_code == 410)
        assert code(second.rest.get(ended["artifact"]["url"])) == "link_expired"
        # As a day later.
        with redis.Redis.from_url(redis_url) as administrator:
            assert administrator.delete(f"{{ll}}:req:{ended['id']}") == 1
        for path in (store / "artifacts").iterdir():
            os.utime(path, (time.time() - 90_000, time.time() - 90_000))
        wait_for(lambda: not list((store / "artifacts").iterdir()), 15)
        assert second.rest.get(f"/v1/requests/{ended['id']}/content").status_code == 404
        swept = [figures(one)['lightloom_store_swept_total{kind="artifacts"}'] for one in (first, second)]
        assert sum(swept) >= 4


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ({"path": "s3://nothing-here", "endpoint_url": "http://127.0.0.1:1"}, "NoCredentialsError"),
        ({"path": "s3://a/b", "endpoint_url": "http://u:p@127.0.0.1:1"}, "must hold no credentials"),
        ({"path": "store", "link_key_file": "nowhere"}, "nowhere cannot be read"),
        ({"path": "store", "link_s": -1.0}, "links must hold"),
        ({"path": "store", "sweep_s": 0.0}, "sweep_s"),
    ],
)
def test_a_gateway_with_a_wrong_store_does_not_start(tmp_path, store, message) -> None:
    store = {key: str(tmp_path / value) if value in ("store", "nowhere") else value for key, value in store.items()}
    config = tmp_path / "gateway.toml"
    write_toml(config, {"gateway": {"http_port": free_port(), "grpc_port": free_port()}, "store": store})
    command = [sys.executable, "-m", "gateway", "--config", str(config)]
    environment = {key: value for key, value in environment_with_malloc().items() if not key.startswith("AWS_")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert ended.returncode == 2 and message in ended.stderr, ended.stderr
