"""A gateway with a Redis user of least rights, over TLS, behind Sentinels, and with a Redis that forgets."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import redis

from lightloom.doctor import examine
from tests.cluster.certificates import new_authority
from tests.cluster.gateway_process import ROOT, GatewayProcess, gateway
from tests.cluster.redis_process import RedisProcess, Relay, redis_process, sentinels
from tests.cluster.running import RunningCluster, cluster_file, wait_for

PASSWORD = "hunter@2/secret"
QUOTED = "hunter%402%2Fsecret"
BODY = {"prompt": "a red circle", "width": 128, "height": 128, "steps": 2}


@pytest.fixture
def stages(running_cluster: RunningCluster) -> dict[str, str]:
    return {stage: running_cluster.address(running_cluster.names(stage)[0]) for stage in ("text_encoder", "dit", "vae")}


def make(running: GatewayProcess, steps: int = 2) -> str:
    answer = running.rest.post("/v1/requests", json={**BODY, "steps": steps})
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def state(running: GatewayProcess, request: str) -> str:
    answer = running.rest.get(f"/v1/requests/{request}")
    return answer.json()["state"] if answer.status_code == 200 else ""


def live_whole_lives(running: GatewayProcess) -> None:
    """Done with its events, its content and its trace, aborted, and listed."""
    request, aborted = make(running), make(running, steps=60)
    assert running.rest.delete(f"/v1/requests/{aborted}").json()["state"] in ("cancelling", "cancelled")
    assert '"state": "done"' in running.rest.get(f"/v1/requests/{request}/events").text
    assert running.rest.get(f"/v1/requests/{request}/content").content.startswith(b"\x89PNG")
    assert running.rest.get(f"/v1/requests/{request}/trace").json()["spans"]
    assert {request, aborted} <= {row["id"] for row in running.rest.get("/v1/requests").json()["data"]}
    wait_for(lambda: state(running, aborted) == "cancelled", 30)


@pytest.fixture
def guarded_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """With the documented ACL, where the hash stands for the password."""
    users = tmp_path / "users.acl"
    text = (ROOT / "deploy/redis/gateway.acl").read_text()
    users.write_text(text.replace("#" + "0" * 64, "#" + hashlib.sha256(PASSWORD.encode()).hexdigest()))
    with redis_process(tmp_path / "redis", f"aclfile {users}") as server:
        yield server


def test_requests_go_through_a_user_of_least_rights(guarded_redis, stages, tmp_path) -> None:
    url_file = tmp_path / "url"
    url_file.write_text(f"redis://lightloom:{QUOTED}@127.0.0.1:{guarded_redis.port}/0")
    with gateway(tmp_path / "g", "", stages, settings={"redis": {"url_file": str(url_file)}}) as running:
        live_whole_lives(running)
        process = psutil.Process(running.process.pid)
        assert "hunter" not in " ".join(process.cmdline()) + running.log.read_text()
    user = guarded_redis.admin(username="lightloom", password=PASSWORD)
    for refused in (
        lambda: user.flushall(),
        lambda: user.keys("*"),
        lambda: user.config_get("maxmemory"),
        lambda: user.eval("return redis.call('KEYS', '*')", 0),
        lambda: user.hgetall("another"),
        lambda: user.evalsha(user.script_load("return redis.call('HSET', KEYS[1], 'a', 1)"), 1, "another"),
        lambda: user.evalsha(user.script_load("return redis.call('FLUSHALL')"), 0),
        lambda: user.pubsub().subscribe("another") or user.publish("another", "x"),
    ):
        with pytest.raises(redis.ResponseError, match="(?i)no permission|NOPERM|ACL|can't run this command"):
            refused()
    with pytest.raises(redis.AuthenticationError):
        guarded_redis.admin().get("{ll}:x")


def test_a_wrong_password_is_said_and_not_shown(guarded_redis, stages, tmp_path) -> None:
    url = f"redis://lightloom:{QUOTED}x@127.0.0.1:{guarded_redis.port}/0"
    with gateway(tmp_path / "g", url, stages, ready=503) as running:
        answer = running.rest.post("/v1/requests", json=BODY)
        assert answer.status_code == 503
        wait_for(lambda: "invalid username-password pair" in running.log.read_text(), 20)
        assert "hunter" not in running.log.read_text() + answer.text


def test_a_redis_that_may_forget_is_refused(stages, tmp_path, monkeypatch) -> None:
    reason = "maxmemory-policy of Redis is allkeys-lru: set it to noeviction, or requests can vanish"
    with redis_process(tmp_path / "redis", "maxmemory-policy allkeys-lru") as server:
        running = GatewayProcess(tmp_path, f"redis://127.0.0.1:{server.port}", stages)
        assert running.ended() == 2
        assert running.log.read_text().splitlines()[-1] == reason
        monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{server.port}")
        [finding] = [found for found in examine(ROOT / "deploy/config/demo.toml", tmp_path) if found.subject == "redis"]
        assert finding.level == "bad" and reason in finding.text
        config = cluster_file(tmp_path, "demo/checkpoints/qwen_image")
        up = [sys.executable, "-m", "lightloom", "up", "--config", str(config), "--run-dir", str(tmp_path / "run")]
        ended = subprocess.run(up, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 2 and reason in ended.stderr


@contextlib.asynccontextmanager
async def tls_redis(folder: Path, files: Mapping[str, str]) -> AsyncIterator[int]:
    """The port of a Redis that asks for client certificates; a relay does it for a server without TLS of its own."""
    if shutil.which("redis-server"):
        lines = [
            f"tls-{what}-file {files[name]}" for what, name in (("ca-cert", "ca"), ("cert", "cert"), ("key", "key"))
        ]
        with redis_process(folder) as probe:
            port = probe.port
        server = RedisProcess(folder, f"tls-port {port}", "port 0", *lines)
        try:
            yield port
        finally:
            server.stop()
        return
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files["ca"])
    context.load_cert_chain(files["cert"], files["key"])
    context.verify_mode = ssl.CERT_REQUIRED
    with redis_process(folder) as server:
        async with Relay(server.port, context) as relay:
            yield relay.port


async def test_requests_go_through_redis_over_tls(stages, tmp_path) -> None:
    files = new_authority(tmp_path)[1]
    async with tls_redis(tmp_path / "redis", files) as port:
        await asyncio.to_thread(_tls_lives, tmp_path, port, files, stages)


def _tls_lives(folder: Path, port: int, files: dict[str, str], stages: dict[str, str]) -> None:
    url = f"rediss://127.0.0.1:{port}/0"
    with gateway(folder / "good", url, stages, settings={"redis": {"tls": files}}) as running:
        live_whole_lives(running)
    stranger = {**files, "ca": new_authority(folder / "other")[1]["ca"]}
    with gateway(folder / "bad", url, stages, ready=503, settings={"redis": {"tls": stranger}}) as running:
        wait_for(lambda: "certificate verify failed" in running.log.read_text(), 20)


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_requests_go_on_after_a_sentinel_failover(stages, tmp_path, how) -> None:
    with sentinels(tmp_path / "redis") as guarded, gateway(tmp_path / "g", guarded.sentinel_url, stages) as running:
        live_whole_lives(running)
        before = make(running, steps=100)
        wait_for(lambda: state(running, before) == "running", 60)
        old = guarded.primary
        process = psutil.Process(old.process.pid)
        process.kill() if how == "killed" else process.suspend()
        wait_for(lambda: running.health() == 200 and guarded.primary is not old, 60)
        wait_for(lambda: _accepted(running), 60)
        wait_for(lambda: state(running, before) == "done", 90)
        live_whole_lives(running)


def _accepted(running: GatewayProcess) -> bool:
    return running.rest.post("/v1/requests", json=BODY).status_code == 202
