"""A picture taken apart through the real gateway: layers come as a zip, over gRPC, REST and from the command line."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from lightloom.client import Client
from services.families import load_family
from services.request import resolve
from tests.cluster.running import serving
from tests.cluster.test_clip_from_pictures import json_of
from tests.oracle.qwen_image import layered, layered_pipeline, picture, wish
from vae_svc.engine import to_pixels

PROMPT = "a red circle on a blue background"
SMALL = {"width": 64, "height": 80, "steps": 4, "seed": 5, "num_frames": 3}
INPUT = picture(90, 50, 1, 4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    load_family("qwen_image").tiny(folder, "layered", 0)
    return folder


@pytest.fixture(scope="module")
def cluster(tiny, tmp_path_factory, monkeypatch_session):
    with serving(tmp_path_factory.mktemp("cluster"), {"models": {"layers": {"source": str(tiny)}}}) as running:
        yield running.cluster


def layers_of(data: bytes) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return np.stack([np.asarray(Image.open(archive.open(name))) for name in sorted(archive.namelist())])


def test_layers_are_the_stock_pipelines(cluster, tiny):
    seen = []
    with Client(cluster.grpc_address) as client:
        result = client.generate(PROMPT, images=[INPUT], preview_every=2, on_progress=seen.append, **SMALL)
    assert (result.mime, result.width, result.height, result.num_frames) == ("application/zip", 64, 80, 3)
    asked = replace(wish(PROMPT, 5, 4, (64, 80), INPUT), num_frames=3, guidance=None)
    params = resolve(asked, load_family("qwen_image").variants["layered"].limits, seed=0)
    with torch.inference_mode():
        _, theirs = layered(layered_pipeline(tiny, torch.float32), params)
    ours = layers_of(result.data)
    assert ours.shape == (3, 80, 64, 4)
    assert np.abs(ours.astype(int) - to_pixels(2 * theirs[None] - 1)[0].astype(int)).max() <= 1
    assert any(event.preview for event in seen)


def test_layers_by_rest(cluster):
    with httpx.Client(base_url=f"http://{cluster.http_address}", timeout=120) as rest:
        made = rest.post("/v1/requests", json={"prompt": PROMPT, "inputs": json_of((INPUT,)), **SMALL}).json()
        rest.get(f"/v1/requests/{made['id']}/events").raise_for_status()
        content = rest.get(f"/v1/requests/{made['id']}/content")
        assert content.headers["content-type"] == "application/zip"
        assert layers_of(content.content).shape == (3, 80, 64, 4)
        assert made["id"] not in [video["id"] for video in rest.get("/v1/videos").json()["data"]]
        assert rest.get(f"/v1/videos/{made['id']}").status_code == 404
        # That call speaks of pictures only.
        answer = rest.post(
            "/v1/images/generations", json={"prompt": PROMPT, "input_image": json_of((INPUT,))[0]["data_url"]}
        )
        assert answer.status_code == 400
        assert "use one of zip, raw" in answer.json()["error"]["message"]


def test_layers_from_the_command_line(cluster, tmp_path):
    target, source = tmp_path / "layers.zip", tmp_path / "picture.png"
    source.write_bytes(INPUT.data)
    command = [sys.executable, "-m", "lightloom", "generate", PROMPT, "-o", str(target), "--image", str(source)]
    options = ["--address", cluster.grpc_address, "--size", "64x80", "--frames", "2", "--steps", "3"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "64x80, 2 layers" in " ".join(done.stderr.split())
    assert layers_of(target.read_bytes()).shape == (2, 80, 64, 4)
