"""Protos and plain data say the same, both ways; what a message cannot hold is refused by name."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import types_pb2
from services.errors import ERRORS, Internal, InvalidRequest
from services.request import (
    AUDIO_FORMATS,
    IMAGE_FORMATS,
    LAYER_FORMATS,
    VIDEO_FORMATS,
    GenerationParams,
    Limits,
    Media,
    resolve,
)
from services.wire import (
    MAX_ERROR_CHARS,
    OUTPUT_FORMATS,
    error_from_proto,
    error_to_proto,
    format_from_proto,
    format_to_proto,
    limits_from_proto,
    limits_to_proto,
    media_from_proto,
    media_to_proto,
    params_from_proto,
    params_to_proto,
    resolved_from_proto,
)

uint32 = st.integers(0, 2**32 - 1)
scale = st.floats(0, 1e6)
media = st.builds(
    Media, st.sampled_from(("image/png", "video/mp4")), st.binary(max_size=20), st.sampled_from(("image", "mask"))
)
params = st.builds(
    GenerationParams,
    model=st.text(),
    prompt=st.text(),
    negative_prompt=st.none() | st.text(),
    width=st.none() | uint32,
    height=st.none() | uint32,
    num_frames=st.none() | uint32,
    fps=st.none() | scale,
    steps=st.none() | uint32,
    guidance=st.none() | scale,
    guidance_2=st.none() | scale,
    seed=st.none() | st.integers(0, 2**64 - 1),
    output_format=st.none() | st.sampled_from(sorted(OUTPUT_FORMATS)),
    quality=st.none() | uint32,
    preview_every=uint32,
    inputs=st.lists(media, max_size=2).map(tuple),
    enable_frame_interpolation=st.booleans(),
    frame_interpolation_exp=st.none() | uint32,
    frame_interpolation_scale=st.none() | scale,
)
COMPLETE = resolve(GenerationParams(model="m", prompt="p"), Limits(), seed=7)


@given(params)
def test_any_request_survives(asked: GenerationParams) -> None:
    proto = types_pb2.GenerationParams.FromString(params_to_proto(asked).SerializeToString())
    assert params_from_proto(proto) == asked


INTERPOLATION = ("enable_frame_interpolation", "frame_interpolation_exp", "frame_interpolation_scale")


def test_complete_parameters_survive() -> None:
    with_picture = replace(COMPLETE, inputs=(Media("image/png", b"123"),))
    for resolved in (COMPLETE, with_picture):
        assert resolved_from_proto(params_to_proto(resolved)) == resolved


def test_interpolation_of_an_older_peer_is_off() -> None:
    proto = params_to_proto(replace(COMPLETE, enable_frame_interpolation=True, frame_interpolation_exp=3))
    assert resolved_from_proto(proto).frame_interpolation_exp == 3
    for name in INTERPOLATION:
        proto.ClearField(name)
    assert resolved_from_proto(proto) == COMPLETE


@pytest.mark.parametrize(
    "name", [f.name for f in fields(COMPLETE) if f.name not in ("prompt", "preview_every", "inputs", *INTERPOLATION)]
)
def test_incomplete_parameters_are_refused_by_name(name: str) -> None:
    proto = params_to_proto(COMPLETE)
    proto.ClearField(name)
    with pytest.raises(InvalidRequest, match=f"params.{name} is not set") as caught:
        resolved_from_proto(proto)
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("width", -1, "a whole number between 0 and 2^32 - 1"),
        ("steps", 2**32, "a whole number between 0 and 2^32 - 1"),
        ("height", 1.5, "a whole number between 0 and 2^32 - 1"),
        ("seed", 2**64, "a whole number between 0 and 2^64 - 1"),
        ("guidance", "much", "a number"),
        ("enable_frame_interpolation", "yes", "True or False"),
        ("prompt", 3, "text of whole Unicode characters"),
        ("negative_prompt", "\ud800", "text of whole Unicode characters"),
        ("model", b"m\xff", "text of whole Unicode characters"),
    ],
)
def test_values_that_no_message_holds(name: str, value: object, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        params_to_proto(GenerationParams(**{"model": "m", "prompt": "p", name: value}))
    assert (caught.value.param, caught.value.message) == (name, f"{name} is {value!r}: it must be {allowed}")


def test_formats() -> None:
    assert set(OUTPUT_FORMATS) == {*IMAGE_FORMATS, *LAYER_FORMATS, *VIDEO_FORMATS, *AUDIO_FORMATS}
    assert len(OUTPUT_FORMATS) == len(types_pb2.OutputFormat.keys()) - 1
    assert all(format_from_proto(format_to_proto(name)) == name for name in OUTPUT_FORMATS)
    assert format_from_proto(types_pb2.OUTPUT_FORMAT_UNSPECIFIED) is None
    with pytest.raises(InvalidRequest, match="'bmp' is unknown: use one of png"):
        format_to_proto("bmp")
    newer = types_pb2.GenerationParams.FromString(b"\x60\x63")
    assert newer.output_format == 99
    with pytest.raises(InvalidRequest, match="99"):
        params_from_proto(newer)


def test_limits_survive() -> None:
    limits = Limits(
        output="video",
        max_frames=81,
        frame_multiple=4,
        default_fps=16.0,
        min_inputs=1,
        max_inputs=2,
        min_steps=3,
        needed_roles=("last_image",),
    )
    assert limits_from_proto(limits_to_proto(limits)) == limits
    # A replica that is older than the field.
    assert limits_from_proto(types_pb2.Limits()).min_steps == 1
    names = {descriptor.name for descriptor in types_pb2.Limits.DESCRIPTOR.fields}
    assert names == {f.name for f in fields(Limits)}


def test_media_without_a_role_is_an_image() -> None:
    assert media_from_proto(types_pb2.Media(mime="image/png", data=b"1")) == Media("image/png", b"1", "image")
    mask = Media("image/png", b"1", "mask")
    assert media_from_proto(media_to_proto(mask)) == mask


@pytest.mark.parametrize("reason", sorted(ERRORS))
def test_every_error_survives(reason: str) -> None:
    error = ERRORS[reason]("what was wrong", param="steps", request_id="r1", retry_after_s=2.5)
    back = error_from_proto(error_to_proto(error))
    assert type(back) is type(error)
    assert vars(back) == vars(error)
    assert error_to_proto(error).retryable == error.retryable


def test_unknown_and_endless_errors() -> None:
    assert type(error_from_proto(types_pb2.ErrorDetail(reason="of_a_newer_peer", message="m"))) is Internal
    assert len(error_to_proto(InvalidRequest("x" * 100_000)).message) == MAX_ERROR_CHARS
