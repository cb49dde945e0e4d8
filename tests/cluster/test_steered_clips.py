"""A clip steered by another through the real gateway: MP4, mask and reference picture; and files that are no clips."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from lightloom.client import Client
from services.errors import InvalidRequest
from services.families import load_family
from services.request import GenerationParams, Media, resolve
from services.weights import open_source
from tests.cluster.running import serving
from tests.cluster.test_cli import lightloom
from tests.cluster.test_clip_from_pictures import json_of
from tests.oracle.wan import clip, load_vace, picture
from vae_svc.engine import to_pixels

FAMILY = load_family("wan")
PROMPT = "a red circle moves to the left"
SMALL = {"width": 96, "height": 64, "steps": 3, "num_frames": 5, "seed": 3}
INPUTS = (clip(96, 64, 7, 1), clip(96, 64, 5, 2, "mask"), picture(50, 80, 3))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    FAMILY.tiny(folder, "vace", 0)
    return folder


@pytest.fixture(scope="module")
def clips(tiny, tmp_path_factory, monkeypatch_session):
    with serving(tmp_path_factory.mktemp("cluster"), {"models": {"clips": {"source": str(tiny)}}}) as running:
        yield running.cluster


def test_its_pixels_are_the_stock_pipelines(clips, tiny):
    with Client(clips.grpc_address) as client:
        result = client.generate(PROMPT, images=INPUTS, output_format="raw", **SMALL)
    ours = np.frombuffer(result.data, np.uint8).reshape(5, 64, 96, 3)
    params = resolve(
        GenerationParams(model="m", prompt=PROMPT, inputs=INPUTS, **SMALL), FAMILY.variants["vace"].limits, seed=0
    )
    with torch.inference_mode():
        latents = load_vace(tiny, torch.float32)(params)
        vae = FAMILY.vae.load(open_source(str(tiny)), torch.device("cpu"), torch.float32)
        frames = torch.cat(list(FAMILY.vae.decode(vae, [latents], params)), dim=1)
    # Guidance branches share a forward here, which costs the last bits: a value may round to its neighbour.
    apart = np.abs(ours.astype(int) - to_pixels(frames)[0].astype(int))
    assert apart.max() <= 1
    assert apart.mean() < 1e-3


def test_by_rest(clips):
    with httpx.Client(base_url=f"http://{clips.http_address}", timeout=120) as rest:
        made = rest.post("/v1/requests", json={"prompt": PROMPT, "inputs": json_of(INPUTS), **SMALL}).json()
        rest.get(f"/v1/requests/{made['id']}/events").raise_for_status()
        status = rest.get(f"/v1/requests/{made['id']}").json()
        assert (status["state"], status["error"]) == ("done", None)
        assert status["artifact"]["num_frames"] == 5


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ((picture(8, 8, 1, "video"),), "no MP4"),
        ((Media("video/mp4", b"\0\0\0\x18ftypisom" + b"\0" * 64, "video"),), "cannot be decoded"),
        ((Media("video/mp4", INPUTS[0].data[:900], "video"),), "input clip"),
        ((clip(96, 64, 3, 1),), "has 3 frames: num_frames is 5"),
        ((INPUTS[1],), "a mask and no clip"),
        ((), "needs an input"),
    ],
    ids=["picture", "head", "cut", "short", "mask alone", "nothing"],
)
def test_what_cannot_steer_is_refused_and_the_next_request_runs(clips, inputs, says):
    with Client(clips.grpc_address) as client:
        with pytest.raises(InvalidRequest, match=says):
            client.generate(PROMPT, images=inputs, **SMALL)
        assert client.generate(PROMPT, images=INPUTS[:1], **SMALL).num_frames == 5


def test_from_the_command_line(clips, tmp_path):
    options = ["--size", "96x64", "--steps", 3, "--frames", 5, "--seed", 3, "--address", clips.grpc_address]
    for name, media in zip(("video.mp4", "mask.mp4", "thing.png"), INPUTS, strict=True):
        (tmp_path / name).write_bytes(media.data)
    options += ["--control-video", tmp_path / "video.mp4", "--mask", tmp_path / "mask.mp4"]
    done = lightloom("generate", PROMPT, "-o", tmp_path / "out.raw", "--image", tmp_path / "thing.png", *options)
    assert done.returncode == 0, done.stderr
    with Client(clips.grpc_address) as client:
        result = client.generate(PROMPT, images=INPUTS, output_format="raw", **SMALL)
    assert (tmp_path / "out.raw").read_bytes() == result.data
