"""Qwen-Image-Layered beyond the oracle's table: layers out of the VAE, transparency, zips, what is refused."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dit_svc.engine import DenoiseJob
from lightloom.local import Local
from services.clip_writer import encode_frames
from services.errors import InvalidRequest
from services.families.qwen_image import FAMILY
from services.media import decode_image
from services.request import GenerationParams, Media, resolve
from services.weights import open_source
from tests.oracle.harness import CPU, Subject, make_folder
from tests.oracle.qwen_image import ROWS, layered, layered_pipeline, picture
from vae_svc.engine import to_pixels

[ROW] = [row for row in ROWS if row.variant == "layered"]
LIMITS = FAMILY.variants["layered"].limits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(ROW, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def test_decoded_layers_are_the_stock_pipelines(folder):
    params = resolve(ROW.wishes[1], LIMITS, seed=0)
    latents, theirs = layered(layered_pipeline(folder, torch.float32), params)
    vae = FAMILY.vae.load(open_source(str(folder)), CPU, torch.float32)
    ours = list(FAMILY.vae.decode(vae, [{"latents": latents}, {"latents": -latents}], params))
    assert [tuple(chunk.shape) for chunk in ours] == [(2, 1, 4, 80, 96)] * 3, "layers leave one by one"
    assert ((torch.cat(ours, dim=1)[0] * 0.5 + 0.5).clamp(0, 1) - theirs).abs().max() <= 1e-5


def test_a_picture_keeps_its_transparency():
    media = picture(20, 10, 1, 4)
    assert np.array_equal(decode_image(media, alpha=True)[0], np.asarray(Image.open(io.BytesIO(media.data))))
    assert decode_image(media).shape == (1, 10, 20, 3)
    assert (decode_image(picture(20, 10, 1), alpha=True)[..., 3] == 255).all()


def test_a_zip_has_every_layer_in_order():
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 4), dtype=np.uint8)
    mime, data = encode_frames(frames, "zip", 90, 0.0)
    assert mime == "application/zip"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == ["00.png", "01.png", "02.png"]
        read = [np.asarray(Image.open(archive.open(name))) for name in archive.namelist()]
    assert np.array_equal(np.stack(read), frames)


def test_layers_without_a_cluster_are_the_stock_pipelines(folder):
    wish = replace(ROW.wishes[0], negative_prompt=" ")
    with Local(str(folder)) as model:
        result = model.generate(
            wish.prompt, inputs=wish.inputs, width=64, height=80, steps=5, seed=1, num_frames=2, output_format="raw"
        )
    ours = np.frombuffer(result.data, np.uint8).reshape(2, 80, 64, 4)
    _, theirs = layered(layered_pipeline(folder, torch.float32), resolve(wish, LIMITS, seed=0))
    assert np.abs(ours.astype(int) - to_pixels(2 * theirs[None] - 1)[0].astype(int)).max() <= 1
    assert ours[..., 3].std() > 0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_frames": 9}, "between 1 and 8"),
        ({"num_frames": 0}, "between 1 and 8"),
        ({"output_format": "png"}, "use one of zip, raw"),
        ({"inputs": ()}, "needs an input picture"),
        ({"inputs": (picture(8, 8, 1),) * 2}, "must be 1"),
        ({"width": 1040, "height": 1024}, "at most 1048576"),
    ],
)
def test_what_is_not_allowed_is_refused(values, says):
    wish = GenerationParams(model="m", **{"prompt": "a", "inputs": (picture(8, 8, 1),), **values})
    with pytest.raises(InvalidRequest, match=says):
        resolve(wish, LIMITS, seed=0)


def test_latents_of_another_size_are_refused(folder):
    subject = Subject(ROW, folder)
    params = subject.params(ROW.wishes[0])
    conditions = subject.job("a", params).conditions
    for wrong in ({"image/0": torch.zeros(1, 16, 10, 10)}, {"image/1": conditions["image/0"]}):
        with pytest.raises(InvalidRequest, match="size of its layers"):
            subject.engine().admit(DenoiseJob("x", params, conditions | wrong))


def test_the_default_shape_is_the_pictures(folder):
    made = resolve(
        GenerationParams(model="m", prompt="a", inputs=(Media("image/png", b"1"),)), LIMITS, seed=0, picture=(200, 100)
    )
    assert (made.width, made.height, made.num_frames, made.output_format) == (896, 448, 4, "zip")
