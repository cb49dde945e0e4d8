"""A clip from its first to its last picture through the real gateway: encoders of pictures, and roles of inputs."""

from __future__ import annotations

import base64
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
from tests.oracle.wan import load_stock_of_pictures, picture
from vae_svc.engine import to_pixels

FAMILY = load_family("wan")
PROMPT = "a red circle moves to the left"
SMALL = {"width": 96, "height": 64, "steps": 3, "num_frames": 5, "seed": 3}
INPUTS = (picture(100, 70, 1), picture(50, 80, 2, "last_image"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    FAMILY.tiny(folder, "flf2v", 0)
    return folder


@pytest.fixture(scope="module")
def clips(tiny, tmp_path_factory, monkeypatch_session):
    with serving(tmp_path_factory.mktemp("cluster"), {"models": {"clips": {"source": str(tiny)}}}) as running:
        yield running.cluster


def json_of(inputs: tuple[Media, ...]) -> list[dict[str, str]]:
    return [
        {"role": media.role, "data_url": f"data:{media.mime};base64,{base64.b64encode(media.data).decode()}"}
        for media in inputs
    ]


def test_its_pixels_are_the_stock_pipelines(clips, tiny):
    with Client(clips.grpc_address) as client:
        result = client.generate(PROMPT, images=INPUTS, output_format="raw", **SMALL)
    ours = np.frombuffer(result.data, np.uint8).reshape(5, 64, 96, 3)
    wish = GenerationParams(model="m", prompt=PROMPT, inputs=INPUTS, **SMALL)
    params = resolve(wish, FAMILY.variants["flf2v"].limits, seed=0)
    with torch.inference_mode():
        latents = load_stock_of_pictures(tiny, torch.float32)(params)
        source = FAMILY.vae.load(open_source(str(tiny)), torch.device("cpu"), torch.float32)
        frames = torch.cat(list(FAMILY.vae.decode(source, [latents], params)), dim=1)
    # Guidance branches share a forward here, which costs the last bits: a value may round to its neighbour.
    apart = np.abs(ours.astype(int) - to_pixels(frames)[0].astype(int))
    assert apart.max() <= 1
    assert apart.mean() < 1e-3


def test_roles_by_rest_and_what_they_may_be(clips):
    with httpx.Client(base_url=f"http://{clips.http_address}", timeout=120) as rest:
        made = rest.post("/v1/requests", json={"prompt": PROMPT, "inputs": json_of(INPUTS), **SMALL}).json()
        rest.get(f"/v1/requests/{made['id']}/events").raise_for_status()
        status = rest.get(f"/v1/requests/{made['id']}").json()
        assert (status["state"], status["error"]) == ("done", None)
        for inputs, says in (
            (INPUTS[:1], "inputs of the role last_image"),
            ((*INPUTS, picture(8, 8, 1, "mask")), "takes no mask; nor does any other"),
        ):
            answer = rest.post("/v1/requests", json={"prompt": PROMPT, "inputs": json_of(inputs), **SMALL})
            assert answer.status_code == 400
            assert says in answer.json()["error"]["message"]
        short = {**SMALL, "num_frames": 1}
        made = rest.post("/v1/requests", json={"prompt": PROMPT, "inputs": json_of(INPUTS), **short}).json()
        rest.get(f"/v1/requests/{made['id']}/events").raise_for_status()
        error = rest.get(f"/v1/requests/{made['id']}").json()["error"]
        assert error["code"] == "invalid_request"
        assert "num_frames is 1" in error["message"]


def test_without_pictures_it_is_refused(clips):
    with Client(clips.grpc_address) as client, pytest.raises(InvalidRequest, match="needs an input picture"):
        client.generate(PROMPT, **SMALL)


def test_from_the_command_line(clips, tmp_path):
    for name, media in zip(("first.png", "last.png"), INPUTS, strict=True):
        (tmp_path / name).write_bytes(media.data)
    options = ["--size", "96x64", "--steps", 3, "--frames", 5, "--seed", 3, "--address", clips.grpc_address]
    options += ["--image", tmp_path / "first.png", "--last-image", tmp_path / "last.png"]
    done = lightloom("generate", PROMPT, "-o", tmp_path / "out.raw", *options)
    assert done.returncode == 0, done.stderr
    with Client(clips.grpc_address) as client:
        result = client.generate(PROMPT, images=INPUTS, output_format="raw", **SMALL)
    assert (tmp_path / "out.raw").read_bytes() == result.data
