"""Wan VACE beyond the oracle's table: what steers a clip beside the stock pipeline, its cut, what is refused."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from diffusers import WanVACEPipeline
from PIL import Image

from dit_svc.engine import DenoiseJob, Stepped
from lightloom.local import Local
from services.errors import InvalidRequest
from services.families import load_family
from services.families.wan.control import clip_and_mask
from services.media import decode_inputs
from services.request import GenerationParams, Media, ResolvedParams, resolve
from services.weights import open_source
from tests.oracle.harness import CPU, Subject, difference, make_folder, relative, run
from tests.oracle.wan import ROWS, clip, picture, steering

FAMILY = load_family("wan")
[ROW] = [row for row in ROWS if row.variant == "vace"]
LIMITS = FAMILY.variants["vace"].limits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(ROW, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def subject(folder):
    with torch.inference_mode():
        return Subject(ROW, folder)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def mask_of(colour: tuple[int, ...]) -> Media:
    file = io.BytesIO()
    Image.new("RGBA", (64, 96), colour).save(file, "PNG")
    return Media("image/png", file.getvalue(), "mask")


def asked(*inputs: Media, **values) -> ResolvedParams:
    wish = GenerationParams(
        model="m", prompt="a", inputs=inputs, **{"width": 64, "height": 96, "num_frames": 9} | values
    )
    return resolve(wish, LIMITS, seed=0)


@pytest.mark.parametrize("wish", ROW.wishes, ids=["all", "picture as mask", "references"])
def test_what_steers_a_clip_is_the_stock_pipelines(folder, subject, wish):
    params = subject.params(wish)
    vae = FAMILY.vae.load(open_source(str(folder)), CPU, torch.float32)
    ours = FAMILY.vae.encode(vae, decode_inputs(params.inputs, params.num_frames), params)["control"]
    pipeline = WanVACEPipeline.from_pretrained(folder, dtype=torch.float32)
    named = {"video": None, "mask": None, "reference_images": None} | steering(params)
    sizes = (1, params.height, params.width, params.num_frames, torch.float32, CPU)
    video, mask, references = pipeline.preprocess_conditions(*named.values(), *sizes)
    latents = pipeline.prepare_video_latents(video, mask, references, None, CPU)
    theirs = torch.cat([latents, pipeline.prepare_masks(mask, references)], dim=1)
    assert torch.equal(ours[:, 32:], theirs[:, 32:])
    assert relative(ours, theirs) <= 1e-5


def test_a_clip_of_another_size_is_stretched_and_a_longer_one_cut(folder):
    vae = FAMILY.vae.load(open_source(str(folder)), CPU, torch.float32)
    params = asked(clip(128, 72, 15, 1), picture(20, 10, 2, "mask"), *[picture(40, 40, index) for index in range(4)])
    control = FAMILY.vae.encode(vae, decode_inputs(params.inputs, params.num_frames), params)["control"]
    assert control.shape == (1, 96, 4 + 3, 12, 8)
    assert not control[:, 16:32, :4].any(), "nothing is made anew in reference pictures"
    assert not control[:, 32:, :4].any()


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([clip(64, 96, 5, 1)], "the input clip has 5 frames: num_frames is 9"),
        ([clip(64, 96, 9, 1), clip(64, 96, 5, 2, "mask")], "the input mask has 5 frames"),
        ([picture(64, 96, 1, "mask")], "a mask and no clip"),
        ([clip(64, 96, 9, 1), mask_of((255, 255, 255, 254))], "transparent pixels: here white is made anew and black"),
        ([picture(7, 96, 1)], "7x96 pixels: its sides need 8"),
        ([picture(8, 4000, 1)], "8x4000 pixels"),
    ],
)
def test_what_cannot_steer_a_clip_is_refused(folder, inputs, says):
    vae = FAMILY.vae.load(open_source(str(folder)), CPU, torch.float32)
    with pytest.raises(InvalidRequest, match=says):
        params = asked(*inputs)
        FAMILY.vae.encode(vae, decode_inputs(params.inputs, params.num_frames), params)


def test_an_alpha_channel_that_hides_nothing_does_not_matter():
    params = asked(clip(64, 96, 9, 1), mask_of((255, 255, 255, 255)))
    _, mask = clip_and_mask(decode_inputs(params.inputs, params.num_frames), params)
    assert (mask == 1).all(), "white is made anew"


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        (["image"] * 5, "role image .* between 0 and 4"),
        (["video", "video"], "role video .* between 0 and 1"),
        (["last_image"], "takes image, video, mask"),
    ],
)
def test_inputs_that_it_does_not_take_are_refused(roles, says):
    with pytest.raises(InvalidRequest, match=says):
        asked(*[picture(8, 8, 1, role) for role in roles])


def test_a_reference_picture_does_not_shape_the_clip():
    wish = GenerationParams(model="m", prompt="a", inputs=(picture(100, 200, 1),))
    made = resolve(wish, LIMITS, seed=0, picture=(100, 200))
    assert (made.width, made.height) == (832, 480)


@pytest.mark.parametrize("change", ["none", "channels", "frames", "many", "rank", "dtype"])
def test_wrong_control_is_refused(subject, change):
    params = subject.params(ROW.wishes[0])
    conditions = dict(subject.job("a", params).conditions)
    control = conditions.pop("control")
    changed = {
        "channels": control[:, 1:],
        "frames": control[:, :, :2],
        "many": control.repeat(1, 1, 3, 1, 1),
        "rank": control[0],
        "dtype": control.to(torch.int64),
    }
    if change != "none":
        conditions["control"] = changed[change]
    with pytest.raises(InvalidRequest, match="needs an input" if change == "none" else "'control'"):
        subject.engine().admit(DenoiseJob("x", params, conditions))


def test_the_control_matters_in_every_block_that_has_it(subject):
    """Each of VACE's blocks adds its hint where the library adds it: without one, the result is another."""
    params = subject.params(ROW.wishes[0])
    state = subject.family.dit.prepare(subject.dit, "a", params, subject.job("a", params).conditions)
    names = [block.name for block in subject.family.dit.blocks(subject.dit.modules[""])]
    assert names == ["blocks.0", "vace_blocks.0", "blocks.1", "blocks.2", "vace_blocks.1", "blocks.3"]
    assert state.latents.shape[2] == 3 + 1, "the reference picture is a frame of the latents"


def test_clips_with_other_numbers_of_references_do_not_share_a_batch(subject):
    wishes = {
        "none": replace(ROW.wishes[0], inputs=ROW.wishes[0].inputs[:1]),
        "one": ROW.wishes[0],
        "other": replace(ROW.wishes[0], inputs=(clip(64, 96, 9, 7), picture(64, 64, 8)), seed=9),
    }
    engine, events, alone = subject.engine(branches="rows", max_batch=8), [], {}
    for name, wish in wishes.items():
        single = subject.engine(branches="serial", max_batch=1)
        single.admit(subject.job(name, subject.params(wish)))
        alone |= run(single, [])
        engine.admit(subject.job(name, subject.params(wish)))
    results = run(engine, events)
    batches = {event.request_id: event.batch for event in events if isinstance(event, Stepped)}
    assert batches == {"none": 1, "one": 2, "other": 2}
    for name, tensors in alone.items():
        assert difference(results[name], tensors) <= 1e-4


def test_a_steered_clip_without_a_cluster(folder):
    with Local(str(folder), width=64, height=96, num_frames=5, steps=2) as model:
        result = model.generate("a cat jumps", inputs=(clip(64, 96, 5, 1),))
    assert (result.mime, result.num_frames) == ("video/mp4", 5)
