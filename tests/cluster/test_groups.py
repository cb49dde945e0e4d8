"""A denoiser on two ranks behind one front: the picture, aborts, a dead rank, a frozen rank. And a text encoder."""

from __future__ import annotations

import io
import os
import signal

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from demo.parse import parse
from demo.scorer import score
from lightloom.client import Client
from lightloom.control import ask
from protos import gateway_pb2
from tests.cluster.running import RunningCluster, wait_for

PROMPT = "a large green square above a small red circle on a white background"
LONG = {"width": 128, "height": 128, "steps": 100}
FILE = """
[models.demo]
source = "demo/checkpoints/qwen_image"
[models.demo.limits]
max_side_px = 1024
default_width = 256
default_height = 256
default_steps = 20
[models.demo.parallel]
ulysses_degree = 2
[models.demo.text_parallel]
tensor_parallel_size = 2
"""


@pytest.fixture(scope="module")
def group(tmp_path_factory, monkeypatch_session):
    file = tmp_path_factory.mktemp("config") / "group.toml"
    file.write_text(FILE)
    running = RunningCluster(tmp_path_factory.mktemp("group"), {"dit": 1}, gateways=1, file=file)
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture
def client(group):
    with Client(group.cluster.grpc_address) as client:
        yield client


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def ranks(group: RunningCluster, stage: str = "dit") -> list[psutil.Process]:
    [name] = group.names(stage)
    [pid] = [row["pid"] for row in group.cluster.status() if row["name"] == name]
    return sorted(psutil.Process(pid).children(), key=lambda process: process.pid)


def serving(group: RunningCluster) -> bool:
    return httpx.get(f"{group.base_url}/health").status_code == 200


def test_two_ranks_draw_what_one_draws(group, client, running_cluster):
    result = client.generate(PROMPT, model="demo", seed=7)
    assert score(picture(result.data), parse(PROMPT)).agrees
    with Client(running_cluster.cluster.grpc_address) as single:
        alone = single.generate(PROMPT, model="demo", seed=7)
    difference = np.abs(picture(result.data).astype(int) - picture(alone.data).astype(int))
    assert difference.max() <= 2
    [name] = group.names("dit")
    [row] = [row for row in ask(group.run_dir, {"command": "status"})["processes"] if row["name"] == name]
    assert (row["ranks"], row["layout"]) == (2, "ulysses 2")
    for rank, pid in enumerate(row["rank_pids"]):
        command = psutil.Process(pid).cmdline()
        assert "dit_svc.rank" in command and command[command.index("--rank") + 1] == str(rank)
    assert len(ranks(group)) == len(row["rank_pids"]) == 2
    [model] = httpx.get(f"{group.base_url}/v1/models").json()["data"]
    shown = {replica["stage"]: (replica["world_size"], replica["layout"]) for replica in model["replicas"]}
    assert shown == {"dit": (2, "ulysses 2"), "text_encoder": (2, "tensor 2"), "vae": (1, "")}


def test_a_text_encoder_on_two_ranks_keeps_its_cache_and_comes_back_when_one_dies(group, client):
    [name] = group.names("text_encoder")
    old = ranks(group, "text_encoder")
    assert len(old) == 2
    first = client.generate(PROMPT, model="demo", seed=8, steps=2)
    hits = group.figures(name)["rank_text_cache_hits_total"]
    assert client.generate(PROMPT, model="demo", seed=8, steps=2).data == first.data
    wait_for(lambda: group.figures(name)["rank_text_cache_hits_total"] > hits)
    request_ids = [client.submit(f"{PROMPT} {number}", model="demo", steps=2) for number in range(6)]
    client.abort(request_ids[0])
    old[1].kill()
    for request_id in request_ids[1:]:
        wait_for(lambda one=request_id: client.get(one).state == gateway_pb2.REQUEST_STATE_DONE, 120)
    assert not {process.pid for process in old} & {process.pid for process in ranks(group, "text_encoder")}
    assert client.generate(PROMPT, model="demo", seed=8, steps=2).data == first.data


def test_an_abort_frees_both_ranks(group, client):
    request_id = client.submit(PROMPT, model="demo", steps=200)
    wait_for(lambda: client.get(request_id).step > 1)
    client.abort(request_id)
    wait_for(lambda: client.get(request_id).state == gateway_pb2.REQUEST_STATE_CANCELLED)
    wait_for(lambda: not group.leftovers())
    assert client.generate(PROMPT, model="demo", steps=2).data


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_takes_the_group_down_and_the_request_goes_on(group, client, victim):
    old = ranks(group)
    request_id = client.submit(PROMPT, model="demo", seed=3, **LONG)
    wait_for(lambda: client.get(request_id).step > 1)
    os.kill(old[victim].pid, signal.SIGKILL)
    wait_for(lambda: not any(process.is_running() for process in old), 15)
    wait_for(lambda: not serving(group), 15)
    wait_for(lambda: serving(group), 60)
    wait_for(lambda: client.get(request_id).state == gateway_pb2.REQUEST_STATE_DONE, 120)
    assert len(ranks(group)) == 2
    assert not {process.pid for process in old} & {process.pid for process in ranks(group)}


def test_frozen_ranks_are_found_and_the_request_goes_on(group, client):
    """The first of one group and the second of the other."""
    old = ranks(group), ranks(group, "text_encoder")
    request_id = client.submit(PROMPT, model="demo", seed=4, **LONG)
    wait_for(lambda: client.get(request_id).step > 1)
    for victim, of_a_group in enumerate(old):
        of_a_group[victim].suspend()
    # They beat once a second; ten seconds of silence are too many.
    wait_for(lambda: not any(process.is_running() for of_a_group in old for process in of_a_group), 20)
    wait_for(lambda: serving(group), 60)
    wait_for(lambda: client.get(request_id).state == gateway_pb2.REQUEST_STATE_DONE, 120)
