"""Requests that go on where they were: after a rank's death, from checkpoints that are damaged, when replicas leave."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.cluster.gateway_process import GatewayProcess, gateway
from tests.cluster.redis_process import own_redis
from tests.cluster.running import RunningCluster, wait_for

OFTEN = {"gateway": {"checkpoint_every_s": 0.2}}
BODY = {"prompt": "a red circle on a white background", "width": 128, "height": 128, "steps": 150, "seed": 3}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[redis.Redis]:
    with own_redis(tmp_path_factory.mktemp("store")) as url, redis.Redis.from_url(url) as client:
        yield client


def url_of(store: redis.Redis) -> str:
    place = store.connection_pool.connection_kwargs
    return f"redis://{place['host']}:{place['port']}/0"


def stages(running_cluster: RunningCluster, denoisers: int) -> dict[str, str]:
    return {
        stage: ",".join(running_cluster.address(name) for name in running_cluster.names(stage)[:count])
        for stage, count in {"text_encoder": 1, "dit": denoisers, "vae": 1}.items()
    }


def begin(running: GatewayProcess) -> str:
    return running.rest.post("/v1/requests", json=BODY).json()["id"]


def end(running: GatewayProcess, request_id: str) -> dict:
    """The request's record when it has ended."""
    found = wait_for(
        lambda: (record := running.rest.get(f"/v1/requests/{request_id}").json())["state"] == "done" and record, 60
    )
    assert isinstance(found, dict)
    return found


def first_steps(running: GatewayProcess, request_id: str) -> list[int]:
    """The first step that was told of after each beginning."""
    blocks = running.rest.get(f"/v1/requests/{request_id}/events").text.split("\n\n")
    events = [
        (block.split("event: ")[1].split("\n")[0], json.loads(block.split("data: ")[1])) for block in blocks if block
    ]
    firsts, fresh = [], False
    for kind, data in events:
        if kind == "status":
            fresh = data["state"] == "running"
        elif kind == "step" and fresh:
            firsts.append(data["step"])
            fresh = False
    return firsts


def picture(running: GatewayProcess, request_id: str) -> bytes:
    return running.rest.get(f"/v1/requests/{request_id}/content").content


def checkpoints(store: redis.Redis, request_id: str) -> list[dict]:
    return json.loads(store.hget(f"{{ll}}:req:{request_id}", "checkpoints") or "[]")


@pytest.fixture(scope="module")
def undisturbed(running_cluster, store, tmp_path_factory) -> bytes:
    """What the request gives without faults, and without a checkpoint: it is a short one by the default."""
    with gateway(tmp_path_factory.mktemp("undisturbed"), url_of(store), stages(running_cluster, 1)) as running:
        request_id = begin(running)
        assert end(running, request_id)["attempt"] == 1
        assert not checkpoints(store, request_id)
        return picture(running, request_id)


@pytest.mark.parametrize("damaged", [0, 1, 2], ids=["whole", "newest cut", "both altered"])
def test_a_request_goes_on_from_its_newest_whole_checkpoint(running_cluster, store, tmp_path, undisturbed, damaged):
    with gateway(tmp_path, url_of(store), stages(running_cluster, 1), settings=OFTEN) as running:
        request_id = begin(running)
        wait_for(lambda: len(checkpoints(store, request_id)) == 2)
        running_cluster.rank(running_cluster.names("dit")[0]).kill()
        wait_for(lambda: running.rest.get(f"/v1/requests/{request_id}").json()["attempt"] >= 1)
        wait_for(lambda: store.hget(f"{{ll}}:req:{request_id}", "state") == b"queued", every_s=0.001)
        kept = checkpoints(store, request_id)
        damage(running, kept, damaged)
        assert end(running, request_id)["attempt"] >= 2
        steps = [one["step"] for one in kept]
        assert first_steps(running, request_id)[-1] == [*steps, 0][damaged] + 1
        assert ("passed over" in running.log.read_text() or "cut short" in running.log.read_text()) == bool(damaged)
        assert picture(running, request_id) == undisturbed
        assert not list((running.store / "latents").iterdir())
    wait_for(lambda: not running_cluster.leftovers(), 60)


def damage(running: GatewayProcess, kept: list[dict], damaged: int) -> None:
    paths = [running.store / "latents" / one["name"] for one in kept]
    if damaged == 1:
        os.truncate(paths[0], paths[0].stat().st_size - 100)
    for path in paths if damaged == 2 else ():
        alter(path)


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def test_a_replica_that_leaves_hands_its_requests_over(running_cluster, store, tmp_path, undisturbed):
    with gateway(tmp_path, url_of(store), stages(running_cluster, 2)) as running:
        request_id = begin(running)
        wait_for(lambda: running.rest.get(f"/v1/requests/{request_id}").json()["step"] > 2)
        [name] = [one for one in running_cluster.names("dit") if running_cluster.figures(one)["rank_dit_requests"]]
        os.kill(running_cluster.pid(name), signal.SIGTERM)
        # It is nobody's fault, and nothing is done again.
        assert end(running, request_id)["attempt"] == 1
        first, again = first_steps(running, request_id)
        assert first == 1 and again > 2
        assert picture(running, request_id) == undisturbed
        assert not list((running.store / "latents").iterdir())
    wait_for(lambda: not running_cluster.leftovers(), 60)


def test_an_abort_takes_the_checkpoints_along(running_cluster, store, tmp_path):
    with gateway(tmp_path, url_of(store), stages(running_cluster, 1), settings=OFTEN) as running:
        request_id = begin(running)
        wait_for(lambda: checkpoints(store, request_id))
        assert running.rest.delete(f"/v1/requests/{request_id}").status_code == 200
        wait_for(lambda: running.rest.get(f"/v1/requests/{request_id}").json()["state"] == "cancelled")
        wait_for(lambda: not list((running.store / "latents").iterdir()))
    wait_for(lambda: not running_cluster.leftovers())
