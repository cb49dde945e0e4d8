"""The chart's interpolation pods as processes: they scale out and in alone while clips are made, and none is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file

from interpolation_svc.ifnet import IFNet, IFNetSpec
from services.families import load_family
from tests.cluster.running import wait_for
from tests.deploy.chart import render, values_named
from tests.deploy.networks import Network
from tests.deploy.pods import Kubelet
from tests.deploy.test_processes import PASSWORD, start

STAGES = ("text-encoder-clips", "dit-clips", "vae-clips", "interpolation")
WISH = {"prompt": "a red circle moves", "enable_frame_interpolation": True, "frame_interpolation_exp": 2}


@pytest.fixture
def kubelet(tmp_path: Path, network: Network) -> Iterator[Kubelet]:
    folders = {name: tmp_path / name for name in ("lightloom-redis", "artifacts", "data", "models")}
    for folder in folders.values():
        folder.mkdir()
    (folders["lightloom-redis"] / "auth.conf").write_text(f"requirepass {PASSWORD}\n")
    load_family("wan").tiny(folders["models"] / "wan", "t2v", 0)
    torch.manual_seed(0)
    (folders["models"] / "rife").mkdir()
    save_file(IFNet(IFNetSpec((16, 12, 8, 8), encodes=True)).state_dict(), folders["models"] / "rife/net.safetensors")
    kubelet = Kubelet(render(values_named("clips")), network, tmp_path, folders)
    yield kubelet
    kubelet.stop()


def make_clips(rest: httpx.Client, stop: threading.Event, made: list[httpx.Response]) -> None:
    """One clip after the other."""
    while not stop.is_set():
        made.append(rest.post("/v1/videos/sync", json=WISH))


@pytest.mark.timeout(600)
def test_interpolators_scale_out_and_in_and_no_clip_is_lost(kubelet: Kubelet, tmp_path: Path) -> None:
    gateway, running = start(kubelet, tmp_path, {stage: f"pix-lightloom-{stage}" for stage in STAGES})
    rest = httpx.Client(base_url=f"http://{gateway.address}:{gateway.port('http')}", timeout=120)
    wait_for(lambda: rest.get("/health").json()["interpolation"], 60)
    wait_for(lambda: rest.get("/health").status_code == 200, 60)
    stop, made = threading.Event(), list[httpx.Response]()
    thread = threading.Thread(target=make_clips, args=(rest, stop, made))
    thread.start()
    try:
        old, new = running["interpolation"], kubelet.create("pix-lightloom-interpolation")
        kubelet.ready(new)
        wait_for(lambda: gateway.figure("lightloom_replicas") == len(STAGES) + 1, 60, every_s=0.2)
        kubelet.delete(old)
        enough = len(made) + 2
        wait_for(lambda: len(made) >= enough or not thread.is_alive(), 60)
    finally:
        stop.set()
        thread.join()
    assert {answer.status_code for answer in made} == {200}
    assert new.figure("lightloom_calls_total") > 0
    artifacts = [request["artifact"] for request in rest.get("/v1/requests").json()["data"]]
    # Four times as many of 5 frames.
    assert {artifact["num_frames"] for artifact in artifacts} == {17}
    assert new.probe("livenessProbe")
    refused = rest.post("/v1/videos", json=WISH | {"frame_interpolation_exp": 3})
    assert "frame_interpolation_exp is 3: it must be between 1 and 2" in refused.json()["error"]["message"]
    # What an autoscaler sees: nothing waits, and the pace is known.
    assert gateway.figure('lightloom_queued_seconds{component="interpolation') == 0
    assert gateway.figure('lightloom_replicas{component="interpolation') == 1
