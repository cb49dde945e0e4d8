"""Parameters against limits: defaults, and every refusal names the value and what is allowed."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest

from services import request
from services.errors import InvalidRequest
from services.families import FAMILIES, load_family
from services.request import GenerationParams, InterpolationLimits, Limits, Media, check, check_interpolation, resolve
from services.wire import params_from_proto, params_to_proto

LIMITS = Limits(max_side_px=1024, max_pixels=512 * 512, default_width=256, default_height=256, default_steps=20)
VIDEO = replace(LIMITS, output="video", max_frames=81, frame_multiple=4, default_frames=17, default_fps=16.0)


def make(**changes: object) -> GenerationParams:
    return GenerationParams(**{"model": "demo", "prompt": "a red circle", **changes})  # type: ignore[arg-type]


def test_defaults_come_from_the_limits() -> None:
    resolved = resolve(make(), LIMITS, seed=7)
    assert (resolved.width, resolved.steps, resolved.seed, resolved.output_format) == (256, 20, 7, "png")
    assert resolved.guidance_2 == resolved.guidance == 4.0
    assert resolve(params_from_proto(params_to_proto(resolved)), LIMITS, seed=0) == resolved


def test_given_values_stay() -> None:
    resolved = resolve(make(seed=0, guidance=0.0, negative_prompt=""), LIMITS, seed=7)
    assert (resolved.seed, resolved.guidance, resolved.negative_prompt) == (0, 0.0, "")


@pytest.mark.parametrize(
    ("changes", "param", "allowed"),
    [
        ({"prompt": ""}, "prompt", "at least one character"),
        ({"prompt": " \n\t"}, "prompt", "at least one character"),
        ({"prompt": "x" * 8001}, "prompt", "at most 8000"),
        ({"prompt": "a\x00b"}, "prompt", "NUL"),
        ({"negative_prompt": "x" * 8001}, "negative_prompt", "at most 8000"),
        ({"width": 250}, "width", "use 240 or 256"),
        ({"height": 0}, "height", "between 64 and 1024"),
        ({"width": 1040}, "width", "between 64 and 1024"),
        ({"width": 1024, "height": 1024}, "width", "at most 262144"),
        ({"steps": 0}, "steps", "between 1 and 200"),
        ({"steps": 10**6}, "steps", "between 1 and 200"),
        ({"guidance": math.nan}, "guidance", "between 0.0 and 30.0"),
        ({"guidance": math.inf}, "guidance", "between 0.0 and 30.0"),
        ({"guidance": -1.0}, "guidance", "between 0.0 and 30.0"),
        ({"seed": -1}, "seed", "between 0 and"),
        ({"seed": 2**63}, "seed", "between 0 and"),
        ({"quality": 0}, "quality", "between 1 and 100"),
        ({"num_frames": 5}, "num_frames", "it must be 1"),
        ({"output_format": "mp4"}, "output_format", "png, jpeg, webp"),
        ({"inputs": (Media("image/png", b""),)}, "inputs", "model 'demo' takes no input pictures"),
        ({"preview_every": -1}, "preview_every", "between 0 and 200"),
        ({"enable_frame_interpolation": True, "output_format": "webp"}, "enable_frame_interpolation", "makes image"),
        ({"frame_interpolation_exp": 1}, "frame_interpolation_exp", "enable_frame_interpolation is false: set that"),
        ({"frame_interpolation_scale": 0.5}, "frame_interpolation_scale", "enable_frame_interpolation is false"),
    ],
)
def test_refusals(changes: dict[str, object], param: str, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve(make(**changes), LIMITS, seed=0)
    assert caught.value.param == param
    assert allowed in caught.value.message


def test_a_schedule_may_need_more_steps_than_one() -> None:
    with pytest.raises(InvalidRequest, match="steps is 1: it must be between 2 and 200"):
        resolve(make(steps=1), replace(LIMITS, min_steps=2), seed=0)


@pytest.mark.parametrize(
    ("changes", "param", "allowed"),
    [
        ({"frame_interpolation_exp": 0}, "frame_interpolation_exp", "between 1 and 4"),
        ({"frame_interpolation_exp": 2**32 - 1}, "frame_interpolation_exp", "between 1 and 4"),
        ({"frame_interpolation_scale": math.inf}, "frame_interpolation_scale", "between 0.25 and 4.0"),
        ({"num_frames": 81, "frame_interpolation_exp": 4}, "frame_interpolation_exp", "makes 1281 frames of 81"),
        ({"width": 512, "height": 512}, "width", "at most 70000"),
        ({"frame_interpolation_exp": 2, "output_format": "gif"}, "fps", "between 1.0 and 50.0"),
        # 257 frames fit, and as raw pixels, or whole in memory, they are too many.
        ({"frame_interpolation_exp": 4, "output_format": "raw"}, "frame_interpolation_exp", "of this size and format"),
        (
            {"fps": 5.0, "frame_interpolation_exp": 4, "output_format": "webp"},
            "frame_interpolation_exp",
            "of this size and format",
        ),
        ({"frame_interpolation_exp": 4, "output_format": "zip"}, "frame_interpolation_exp", "of this size and format"),
        (
            {"fps": 1.0, "frame_interpolation_exp": 4, "output_format": "gif"},
            "frame_interpolation_exp",
            "of this size and format",
        ),
    ],
)
def test_what_interpolation_does_not_accept(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], param: str, allowed: str
) -> None:
    monkeypatch.setattr(request, "MAX_MEDIA_BYTES", 256 * 256 * 3 * 100)
    limits = InterpolationLimits(max_frames=1000, max_pixels=70_000)
    smooth = {"enable_frame_interpolation": True}
    check_interpolation(resolve(make(frame_interpolation_exp=3, **smooth), VIDEO, seed=0), limits)
    with pytest.raises(InvalidRequest, match=allowed) as caught:
        check_interpolation(resolve(make(**changes, **smooth), VIDEO, seed=0), limits)
    assert caught.value.param == param


@pytest.mark.parametrize(("output_format", "most"), [("gif", 50.0), ("webp", 90.0)])
def test_a_file_is_no_faster_than_browsers_play_it(output_format, most) -> None:
    check(resolve(make(fps=most, output_format=output_format), VIDEO, seed=0), VIDEO)
    with pytest.raises(
        InvalidRequest, match=rf"fps of a {output_format} is {most + 1}: it must be between 1.0 and {most}"
    ):
        resolve(make(fps=most + 1, output_format=output_format), VIDEO, seed=0)
    smooth = make(fps=most / 2 + 1, output_format=output_format, enable_frame_interpolation=True)
    with pytest.raises(InvalidRequest, match=rf"fps of a {output_format}, 2 times {most / 2 + 1}, is {most + 2}"):
        check_interpolation(resolve(smooth, VIDEO, seed=0), InterpolationLimits())


def test_frames_follow_the_rule_of_the_model() -> None:
    with pytest.raises(InvalidRequest, match="use 17 or 21"):
        resolve(make(num_frames=18), VIDEO, seed=0)
    with pytest.raises(InvalidRequest, match="fps is 0.5"):
        resolve(make(fps=0.5), VIDEO, seed=0)
    with pytest.raises(InvalidRequest, match="fps is for clips"):
        resolve(make(fps=16.0), LIMITS, seed=0)
    check(resolve(make(num_frames=21), VIDEO, seed=0), VIDEO)


def test_an_edit_model_needs_a_picture() -> None:
    with pytest.raises(InvalidRequest, match="model 'demo' needs an input picture"):
        resolve(make(), replace(LIMITS, min_inputs=1, max_inputs=1), seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_accepts_no_rank_with_its_weights_refuses(family) -> None:
    """The stages get the inputs that they work with, the others none."""
    for variant in load_family(family).variants.values():
        limits = variant.limits
        fewest = ("image",) * max(limits.min_inputs, limits.needs_any_input) + limits.needed_roles
        most = ("image",) * limits.max_inputs + limits.other_roles
        for roles in (fewest, most):
            resolved = resolve(make(inputs=tuple(Media("", b"x", role) for role in roles)), limits, seed=0)
            check(resolved, limits.of_any_model())
            check(replace(resolved, inputs=()), limits.of_any_model())


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((1000, 1000), (1024, 1024)),
        ((1200, 800), (1248, 832)),
        ((90, 160), (768, 1376)),
        ((4000, 100), (3584, 160)),
        ((100, 4000), (160, 3584)),
        ((65535, 1), (3584, 64)),
    ],
)
def test_without_a_size_the_result_has_the_pictures_shape(picture, size) -> None:
    limits = Limits(max_inputs=1, max_side_px=3584)
    resolved = resolve(make(inputs=(Media("image/png", b"x"),)), limits, seed=0, picture=picture)
    assert (resolved.width, resolved.height) == size
    asked = resolve(make(width=512, height=256), limits, seed=0, picture=picture)
    assert (asked.width, asked.height) == (512, 256)


def test_the_pictures_shape_stays_within_the_models_pixels() -> None:
    limits = Limits(default_width=512, default_height=512, max_pixels=512 * 512)
    for width in range(10, 4000, 37):
        resolved = resolve(make(), limits, seed=0, picture=(width, 999))
        assert resolved.width * resolved.height <= 512 * 512
        assert resolved.width % 32 == resolved.height % 32 == 0


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        (("image",), "takes a picture and a mask .* or neither: there is only the picture"),
        (("mask",), "or neither: there is only the mask"),
        (("image", "mask", "mask"), "of the role mask .* between 0 and 1"),
        (("image", "mask"), ""),
        ((), ""),
    ],
)
def test_a_picture_that_needs_a_mask_comes_with_one_or_not_at_all(roles, says):
    limits = replace(LIMITS, max_inputs=1, optional_roles=("mask",), pictures_need_mask=True)
    wish = make(inputs=tuple(Media("image/png", b"", role) for role in roles))
    with pytest.raises(InvalidRequest, match=says) if says else nullcontext():
        resolve(wish, limits, seed=0)


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        ((), "needs an input of the role image or video, and there is none"),
        (("mask",), "a mask and no clip"),
        (("image", "mask"), "a mask and no clip"),
        (("image",), ""),
        (("video", "mask"), ""),
    ],
)
def test_what_steers_a_clip_is_there(roles, says):
    limits = replace(LIMITS, max_inputs=4, optional_roles=("video", "mask"), needs_any_input=True)
    wish = make(inputs=tuple(Media("image/png", b"", role) for role in roles))
    with pytest.raises(InvalidRequest, match=says) if says else nullcontext():
        resolve(wish, limits, seed=0)
    assert limits.of_any_model().needs_any_input is False
