"""Edits under a mask beyond the oracle's table: what stays, what previews show, what is refused."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dit_svc.engine import DenoiseJob
from services.errors import InvalidRequest
from services.families.qwen_image.latents import pack
from services.media import check_mask, decode_inputs
from services.request import Limits, Media
from tests.oracle.harness import Subject, make_folder, run
from tests.oracle.qwen_image import ROWS, mask, picture
from tests.unit.test_media import bomb

[ROW] = [row for row in ROWS if str(row) == "qwen_image-edit-mask"]
LIMITS = Limits(output="image")
LATENTS = torch.zeros(1, 16, 8, 12)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    with torch.inference_mode():
        return Subject(ROW, make_folder(ROW, tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def opaque(width: int, height: int) -> Media:
    file = io.BytesIO()
    Image.new("RGBA", (width, height), (0, 0, 0, 255)).save(file, "PNG")
    return Media("image/png", file.getvalue(), "mask")


def test_outside_of_the_mask_the_latents_are_the_pictures_own(subject):
    """In any size: the picture is read once more where it is not made in the size that the model looks at it."""
    wish = replace(ROW.wishes[0], width=112, height=80)
    job = subject.job("a", subject.params(wish))
    assert job.conditions["kept"].shape == (1, 16, 10, 14)
    kept, anew = (pack(job.conditions[name].expand(-1, 16, -1, -1)) for name in ("kept", "mask"))
    engine = subject.engine()
    engine.admit(job)
    [made] = run(engine, [])["a"].values()
    assert 0.2 < anew.mean() < 0.4
    assert torch.equal(made[anew == 0], kept[anew == 0])
    assert (made - kept)[anew == 1].abs().min() > 0


def test_a_preview_shows_what_stays_without_noise(subject):
    params, part = subject.params(ROW.wishes[0]), subject.family.dit
    job = subject.job("a", params)
    state = part.prepare(subject.dit, "a", params, job.conditions)
    prediction = torch.randn(state.latents.shape)
    part.advance(subject.dit, state, prediction)
    shown = part.preview_latents(subject.dit, state, prediction)
    anew = job.conditions["mask"].expand(-1, 16, -1, -1)
    assert torch.equal(shown[anew == 0], job.conditions["kept"][anew == 0])
    assert (shown - job.conditions["kept"])[anew == 1].abs().min() > 0


def test_requests_with_a_mask_and_without_share_forwards(subject):
    engine, events = subject.engine(max_batch=8), []
    plain = replace(ROW.wishes[0], inputs=ROW.wishes[0].inputs[:1])
    for name, wish in {"masked": ROW.wishes[0], "plain": plain}.items():
        engine.admit(subject.job(name, subject.params(wish)))
    run(engine, events)
    assert {event.batch for event in events if hasattr(event, "batch")} == {2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (mask(40, 50, 1), "the mask has 40x50 pixels: the .first. picture has 50x50"),
        (replace(picture(50, 50, 1), role="mask"), "the mask has no transparency"),
        (Media("image/png", b"no picture", "mask"), "no known format.: send a whole PNG"),
        (Media("image/png", bomb(60000, 60000), "mask"), "too many pixels"),
    ],
    ids=["size", "no alpha", "no picture", "bomb"],
)
def test_a_bad_mask_is_found_by_its_header(given, message):
    with pytest.raises(InvalidRequest, match=message):
        check_mask([given, picture(50, 50, 1)], LIMITS)


def png(colour_type: int, *chunks: tuple[bytes, bytes]) -> Media:
    """A PNG of 50x50 pixels without pixels."""
    header = struct.pack(">IIBBBBB", 50, 50, 8, colour_type, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), *chunks, (b"IDAT", b""), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return Media("image/png", data, "mask")


PALETTE = (b"PLTE", bytes(range(6)))


@pytest.mark.parametrize(
    ("given", "transparent"),
    [
        (png(4), True),
        (png(6), True),
        (png(3, PALETTE, (b"tRNS", b"\0\xff")), True),
        (png(2, (b"tRNS", bytes(6))), True),
        (png(3, PALETTE), False),
        (png(3), False),
        (png(0), False),
    ],
    ids=["grey", "colour", "palette", "one colour", "opaque palette", "no palette", "opaque grey"],
)
def test_transparency_is_told_by_the_header(given, transparent):
    with nullcontext() if transparent else pytest.raises(InvalidRequest, match="no transparency"):
        check_mask([picture(50, 50, 1), given], LIMITS)


def test_a_mask_is_as_large_as_the_picture_is_upright():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(file, "JPEG", exif=exif)
    phone = Media("image/jpeg", file.getvalue())
    check_mask([phone, mask(40, 60, 1)], LIMITS)
    with pytest.raises(InvalidRequest, match="the mask has 60x40 pixels"):
        check_mask([phone, mask(60, 40, 1)], LIMITS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (opaque(50, 50), "no transparent area of 8x8 pixels"),
        (mask(40, 50, 1), "another size than the first picture"),
    ],
    ids=["opaque", "size"],
)
def test_a_mask_is_checked_where_its_pixels_are_read(subject, given, message):
    params = subject.params(replace(ROW.wishes[0], inputs=(picture(50, 50, 1), given)))
    with pytest.raises(InvalidRequest, match=message):
        subject.family.vae.encode(subject.vae._model, decode_inputs(params.inputs), params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": None}, "'kept' is missing"),
        ({"kept": LATENTS[:, :4]}, r"'kept' has the shape .* must be \[1, 16, 8, 12\]"),
        ({"mask": LATENTS[:, :1, :4]}, r"'mask' has the shape .* must be \[1, 1, 8, 12\]"),
        ({"mask": LATENTS[:, :1].bool()}, "floating-point"),
    ],
)
def test_wrong_conditions_are_refused(subject, changes, message):
    params = subject.params(replace(ROW.wishes[0], guidance=1.0))
    conditions = {"positive/text": torch.zeros(1, 5, 48), "image/0": LATENTS, "kept": LATENTS, "mask": LATENTS[:, :1]}
    given = {name: value for name, value in (conditions | changes).items() if value is not None}
    engine = subject.engine()
    with pytest.raises(InvalidRequest, match=message):
        engine.admit(DenoiseJob("x", params, given))
    assert not engine.busy
