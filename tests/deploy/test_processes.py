"""The chart's pods as processes: every stage scales out and in alone, with requests in flight, and none is lost."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.cluster.running import listens, wait_for
from tests.deploy.chart import ROOT, render, values_named
from tests.deploy.networks import Network
from tests.deploy.pods import Kubelet, Pod

PROMPT = "a small red circle on a white background"
PASSWORD = "a-password-of-the-test"
STAGES = ("text-encoder", "dit", "vae")
CLIENTS = 2


@pytest.fixture
def kubelet(tmp_path: Path, network: Network) -> Iterator[Kubelet]:
    folders = {name: tmp_path / name for name in ("lightloom-redis", "lightloom-agents", "artifacts", "data")}
    for folder in folders.values():
        folder.mkdir()
    (folders["lightloom-redis"] / "auth.conf").write_text(f"requirepass {PASSWORD}\n")
    (folders["lightloom-agents"] / "token").write_text("a-token-of-the-test\n")
    objects = render(values_named("processes"))
    kubelet = Kubelet(objects, network, tmp_path, folders | {"models": ROOT / "demo/checkpoints"})
    yield kubelet
    kubelet.stop()


class Load:
    """Clients that ask for one picture after the other."""

    def __init__(self, gateway: Pod) -> None:
        self.failures: list[str] = []
        self.pictures = 0
        self._url = f"http://{gateway.address}:{gateway.port('http')}"
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as rest:
            while not self._stop.is_set():
                answer = rest.post("/v1/images/generations", json={"prompt": PROMPT, "steps": 12})
                if answer.status_code != 200:
                    self.failures.append(answer.text)
                    return
                data = base64.b64decode(answer.json()["data"][0]["b64_json"])
                assert Image.open(io.BytesIO(data)).size == (64, 64)
                self.pictures += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def goes_on(self) -> None:
        """Waits for two more pictures of each client."""
        enough = self.pictures + 2 * CLIENTS
        wait_for(lambda: self.pictures >= enough or self.failures, 60)


def start(kubelet: Kubelet, folder: Path, stages: Mapping[str, str]) -> tuple[Pod, dict[str, Pod]]:
    """Redis, the pods of stages by their templates' names, and a gateway: the gateway, and the others by stage."""
    redis = kubelet.create("pix-lightloom-redis")
    url = f"redis://:{PASSWORD}@{redis.address}:{redis.port('redis')}/0\n"
    (folder / "lightloom-redis/url").write_text(url)
    running = {stage: kubelet.create(template) for stage, template in stages.items()}
    gateway = kubelet.create("pix-lightloom-gateway")
    kubelet.ready(gateway, *running.values())
    return gateway, running


@pytest.mark.timeout(900)
def test_each_stage_scales_out_and_in_alone_and_no_request_is_lost(kubelet: Kubelet, tmp_path: Path) -> None:
    gateway, running = start(kubelet, tmp_path, {stage: f"pix-lightloom-{stage}-demo" for stage in STAGES})
    rest = httpx.Client(base_url=f"http://{gateway.address}:{gateway.port('http')}", timeout=60)
    wait_for(lambda: rest.get("/health").status_code == 200, 60)
    with Load(gateway) as load:
        for stage in STAGES:
            old, new = running[stage], kubelet.create(f"pix-lightloom-{stage}-demo")
            kubelet.ready(new)
            wait_for(lambda: gateway.figure("lightloom_replicas") == len(STAGES) + 1, 60, every_s=0.2)
            if stage == "dit":
                # Requests are long enough to overlap: each replica gets one.
                wait_for(lambda new=new: new.figure("lightloom_calls_total") > 0, 60, every_s=0.2)
            kubelet.delete(old)
            load.goes_on()
            assert new.figure("lightloom_calls_total") > 0
            running[stage] = new
    assert not load.failures
    listed = rest.get("/v1/requests", params={"limit": 1000}).json()["data"]
    assert {request["state"] for request in listed} == {"done"}
    assert len(listed) == load.pictures
    # What a stage that leaves hands back is no failed attempt.
    assert max(request["attempt"] for request in listed) == 1
    assert all(pod.probe("livenessProbe") and pod.figure("lightloom_in_flight") == 0 for pod in running.values())
    # What an autoscaler sees now: each stage has one replica again, and its pace is known.
    assert gateway.figure("lightloom_replicas") == len(STAGES)
    assert gateway.figure("lightloom_queued_seconds{") == gateway.figure("lightloom_queued_requests{") == 0


@pytest.mark.timeout(600)
def test_a_group_over_two_pods_forms_and_leaves_in_order(kubelet: Kubelet, network: Network) -> None:
    name = "pix-lightloom-dit-pair"
    workers = f"{name}-worker", f"{name}-0-1"
    kubelet.place(*workers)
    leader = kubelet.create(name, f"{name}-0")
    # More often than a group that cannot start is tried: a host may take its time.
    wait_for(lambda: leader.log.read_text().count("does not answer") > 3, 120)
    assert leader.probe("livenessProbe") and not leader.probe("readinessProbe")
    worker = kubelet.create(*workers)
    # As LeaderWorkerSet's own headless service has it.
    network.publish(f"{worker.name}.{name}", [(worker.address, worker.port("agent"))])
    kubelet.ready(leader)
    # A worker that is told to stop lends nothing more, and its rank goes only when its leader lets it go.
    losses = leader.log.read_text().count("rank lost")
    worker.process.terminate()
    wait_for(lambda: not listens(worker.address, worker.port("agent")))
    assert leader.probe("readinessProbe")
    kubelet.delete(leader, worker)
    assert leader.log.read_text().count("rank lost") == losses
