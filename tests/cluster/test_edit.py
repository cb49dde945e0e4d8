"""Edits through the real gateway: a tiny edit model, REST and gRPC, and pictures that must be refused."""

from __future__ import annotations

import base64
import io
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from gateway.replica import BACK_OFF_S
from lightloom.client import Client
from services.errors import InvalidRequest
from services.families import load_family
from services.request import Media, resolve
from tests.cluster.running import serving
from tests.cluster.test_cli import lightloom, refused
from tests.oracle.qwen_image import edit_pipeline, edited, give_token_types, mask, picture, wish
from tests.unit.test_media import bomb

PROMPT = "make it red"
SMALL = {"width": 64, "height": 80, "steps": 4, "seed": 5}
INPUT = picture(90, 50, 1)


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    load_family("qwen_image").tiny(folder, "edit", 0)
    return folder


@pytest.fixture(scope="module")
def edits(tiny, tmp_path_factory, monkeypatch_session):
    limits = {"default_width": 64, "default_height": 64, "default_steps": 4}
    with serving(
        tmp_path_factory.mktemp("cluster"), {"models": {"edits": {"source": str(tiny), "limits": limits}}}
    ) as running:
        yield running


@pytest.fixture
def client(edits):
    with Client(edits.cluster.grpc_address) as client:
        yield client


@pytest.fixture
def rest(edits):
    with httpx.Client(base_url=edits.base_url, timeout=120) as client:
        yield client


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_picture_is_the_stock_pipelines(client, tiny):
    result = client.generate(PROMPT, images=[INPUT.data], **SMALL)
    assert (result.mime, result.width, result.height) == ("image/png", 64, 80)
    assert set(result.busy_s) == {"text_encoder", "dit", "vae"}
    asked = replace(wish(PROMPT, 5, 4, (64, 80), INPUT), guidance=None)
    params = resolve(asked, load_family("qwen_image").variants["edit"].limits, seed=0)
    with torch.inference_mode():
        pipeline = edit_pipeline(tiny, torch.float32)
        give_token_types(pipeline)
        [expected] = edited(pipeline, tiny, params, output_type="pil")
    difference = pixels(result.data).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1


def test_rest_and_grpc_make_the_same_picture_and_the_input_matters(client, rest):
    theirs = client.generate(PROMPT, images=[INPUT.data], **SMALL).data
    body = {"prompt": PROMPT, "size": "64x80", "steps": 4, "seed": 5, "image": url(INPUT.data)}
    answer = rest.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    assert base64.b64decode(answer.json()["data"][0]["b64_json"]) == theirs
    made = rest.post("/v1/requests", json={"prompt": PROMPT, **SMALL, "inputs": [{"data_url": url(INPUT.data)}]})
    assert made.status_code == 202, made.text
    rest.get(f"/v1/requests/{made.json()['id']}/events")
    assert rest.get(f"/v1/requests/{made.json()['id']}/content").content == theirs
    seen = rest.get(f"/v1/requests/{made.json()['id']}").json()["params"]["inputs"]
    assert (
        seen == made.json()["params"]["inputs"] == [{"mime": "image/png", "role": "image", "nbytes": len(INPUT.data)}]
    )
    other = client.generate(PROMPT, images=[picture(90, 50, 2).data], **SMALL).data
    assert not np.array_equal(pixels(other), pixels(theirs))


def test_the_openai_client_edits_with_files(client, edits):
    theirs = openai.OpenAI(base_url=f"{edits.base_url}/v1", api_key="none", max_retries=0)
    wish = {"prompt": PROMPT, "size": "64x80", "extra_body": {"steps": 4, "seed": 5}}
    expected = client.generate(PROMPT, images=[INPUT.data], **SMALL).data
    for image in (INPUT.data, ("cat.png", INPUT.data, "image/png"), [INPUT.data]):
        made = theirs.images.edit(image=image, input_fidelity="high", **wish)
        assert base64.b64decode(made.data[0].b64_json) == expected
    events = list(theirs.images.edit(image=INPUT.data, stream=True, partial_images=1, **wish))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert base64.b64decode(events[-1].b64_json) == expected


def test_the_openai_client_edits_under_a_mask(client, rest, edits):
    theirs = openai.OpenAI(base_url=f"{edits.base_url}/v1", api_key="none", max_retries=0)
    area = mask(90, 50, 4)
    made = theirs.images.edit(
        image=INPUT.data, mask=area.data, prompt=PROMPT, size="64x80", extra_body={"steps": 4, "seed": 5}
    )
    ours = client.generate(PROMPT, images=[INPUT.data, area], **SMALL).data
    assert base64.b64decode(made.data[0].b64_json) == ours
    body = {"prompt": PROMPT, "size": "64x80", "steps": 4, "seed": 5, "image": url(INPUT.data), "mask": url(area.data)}
    answer = rest.post("/v1/images/generations", json=body)
    assert base64.b64decode(answer.json()["data"][0]["b64_json"]) == ours
    plain = client.generate(PROMPT, images=[INPUT.data], **SMALL).data
    assert not np.array_equal(pixels(ours), pixels(plain))


def test_a_mask_from_the_command_line(client, edits, tmp_path):
    area = mask(90, 50, 4)
    for name, media in (("picture.png", INPUT), ("mask.png", area)):
        (tmp_path / name).write_bytes(media.data)
    options = ["--size", "64x80", "--steps", 4, "--seed", 5, "--address", edits.cluster.grpc_address]
    command = ["generate", PROMPT, "-o", tmp_path / "out.png", "--image", tmp_path / "picture.png"]
    done = lightloom(*command, "--mask", tmp_path / "mask.png", *options)
    assert done.returncode == 0, done.stderr
    expected = client.generate(PROMPT, images=[INPUT.data, area], **SMALL).data
    assert (tmp_path / "out.png").read_bytes() == expected
    refused(lightloom(*command, "--mask", tmp_path / "picture.png", *options), 1, "the mask has no transparency")


BAD_MASKS = {
    "another size": (mask(50, 90, 4).data, "the mask has 50x90 pixels"),
    "no transparency": (INPUT.data, "the mask has no transparency"),
    "no picture": (b"not a picture", "mask is of no known type"),
    "broken": (b"\x89PNG\r\n\x1a\n" + b"\x00" * 64, "cannot be decoded"),
    "bomb": (bomb(60000, 60000), "too many pixels"),
    "clip": (b"\0\0\0\x18ftypisom" + b"\0" * 64, "cannot be decoded"),
    "cut": (mask(90, 50, 4).data[:-300], "cannot be decoded"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_a_bad_mask_is_refused_and_the_service_lives(rest, client, edits, case):
    data, text = BAD_MASKS[case]
    before = edits.cluster.status()
    answer = rest.post("/v1/images/edits", data={"prompt": PROMPT}, files={"image": INPUT.data, "mask": data})
    assert answer.status_code == 400, answer.text
    assert text in answer.json()["error"]["message"]
    with pytest.raises(InvalidRequest):
        client.generate(PROMPT, images=[INPUT.data, Media("image/png", data, "mask")])
    assert client.generate(PROMPT, images=[INPUT.data], **SMALL).data
    assert edits.cluster.status() == before


def test_one_mask_and_only_with_a_picture(rest):
    area = mask(90, 50, 4).data
    answer = rest.post("/v1/images/edits", data={"prompt": PROMPT}, files={"mask": area})
    assert answer.status_code == 400
    assert "image is missing" in answer.json()["error"]["message"]
    files = [("image", INPUT.data), ("mask", area), ("mask", area)]
    answer = rest.post("/v1/images/edits", data={"prompt": PROMPT}, files=files)
    assert answer.status_code == 400
    assert "inputs of the role mask (count) is 2" in answer.json()["error"]["message"]


def test_without_a_size_the_result_has_the_pictures_shape(client):
    result = client.generate(PROMPT, images=[picture(400, 100, 1).data])
    assert pixels(result.data).shape == (64, 128, 3)


def test_both_encoders_saw_the_picture(client):
    result = client.generate(PROMPT, images=[INPUT.data], **SMALL)
    names = {span.name for span in client.trace(result.request_id)}
    assert {"text.encode", "vae.encode", "dit.denoise", "vae.decode"} <= names


HEADER_BROKEN = b"\x89PNG\r\n\x1a\n" + b"\x00" * 64
REFUSED = {
    "none": ([], "needs an input picture"),
    "two": ([INPUT.data] * 2, "inputs of the role image (count) is 2: it must be 1"),
    "broken": ([HEADER_BROKEN], "cannot be decoded"),
    "bomb": ([bomb(60000, 60000)], "too many pixels"),
    "bomb that the library allows": ([bomb(9000, 9000)], "too many pixels"),
}
# What the header does not tell is found where the pixels are decoded.
FAILED = {
    "cut": ([INPUT.data[:-300]], "cannot be decoded"),
    "thread": ([picture(2000, 2, 1).data], "too long for the other"),
}


@pytest.mark.parametrize("case", [*REFUSED, *FAILED])
def test_bad_pictures_are_refused_and_the_service_lives(rest, client, edits, case):
    images, text = (REFUSED | FAILED)[case]
    before = edits.cluster.status()
    answer = rest.post("/v1/images/generations", json={"prompt": PROMPT, "image": [url(data) for data in images]})
    assert answer.status_code == 400, answer.text
    assert text in answer.json()["error"]["message"]
    with pytest.raises(InvalidRequest, match=text.replace("(", r"\(").replace(")", r"\)")):
        client.generate(PROMPT, images=images)
    assert client.generate(PROMPT, images=[INPUT.data], **SMALL).data
    assert edits.cluster.status() == before


def test_a_bad_picture_holds_nobody_up(client):
    took_s = []
    for _ in range(3):
        with pytest.raises(InvalidRequest):
            client.generate(PROMPT, images=FAILED["cut"][0])
        started_s = time.monotonic()
        client.generate(PROMPT, images=[INPUT.data], **SMALL)
        took_s.append(time.monotonic() - started_s)
    assert min(took_s) < 0.8 * BACK_OFF_S, "the encoder was left alone as if it had been at fault"


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_header_tells_is_refused_before_anything_is_queued(rest, case):
    images, text = REFUSED[case]
    before = len(rest.get("/v1/requests").json()["data"])
    body = {"prompt": PROMPT, "inputs": [{"data_url": url(data)} for data in images]}
    answer = rest.post("/v1/requests", json=body)
    assert answer.status_code == 400, answer.text
    assert text in answer.json()["error"]["message"]
    assert len(rest.get("/v1/requests").json()["data"]) == before


def test_a_prompt_that_holds_the_image_mark_is_refused(client):
    with pytest.raises(InvalidRequest, match="image_pad"):
        client.generate("make <|image_pad|> red", images=[INPUT.data], **SMALL)
