"""Pictures from outside: upright pixels or InvalidRequest, whatever the bytes are; headers before pixels."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import ExifTags, Image, ImageFile, ImageOps

from gateway.http_inputs import media_of_bytes
from services import clip_writer
from services.clip_writer import ClipWriter, encode_frames
from services.errors import InvalidRequest
from services.media import MAX_INPUT_PIXELS, PICTURE_FORMATS, decode_image, first_picture, image_size
from services.request import Media

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def file_of(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is huge."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode):
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert("L" if mode == "I;16" else mode).convert(mode).save(file, "PNG")
    assert decode_image(Media("image/png", file.getvalue())).shape == (1, 24, 40, 3)


def test_grey_of_16_bits_keeps_its_shades():
    shades = np.linspace(0, 65535, 40).astype(np.uint16)[None].repeat(24, 0)
    file = io.BytesIO()
    Image.fromarray(shades).save(file, "PNG")
    decoded = decode_image(Media("image/png", file.getvalue()))[0]
    assert np.array_equal(decoded, (shades >> 8).astype(np.uint8)[..., None].repeat(3, 2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_come_upright(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = file_of("PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_image(Media("image/png", data))[0], np.asarray(upright))
    assert image_size(Media("image/png", data)) == upright.size


def test_a_broken_exif_block_does_not_cost_the_picture():
    data = file_of("PNG", exif=b"Exif\x00\x00garbage of no kind")
    assert np.array_equal(decode_image(Media("image/png", data))[0], PIXELS)


def test_the_first_picture_tells_the_size_and_all_are_checked():
    small, other = Media("image/png", file_of("PNG")), Media("image/jpeg", b"no picture", "last_image")
    assert first_picture([Media("audio/wav", b"RIFF", "audio"), small]) == (40, 24)
    assert first_picture([]) is None
    with pytest.raises(InvalidRequest, match="no known format"):
        first_picture([small, other])


def test_looking_at_the_header_decodes_nothing(monkeypatch):
    files = [file_of(kind) for kind in ("PNG", "JPEG", "WEBP")]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    assert [image_size(Media("image/png", data)) for data in files] == [(40, 24)] * 3


@pytest.mark.parametrize(("width", "height"), [(60000, 60000), (12000, 8000), (8193, 8193), (2**31 - 1, 2**31 - 1)])
def test_a_header_that_promises_too_much_is_refused_by_the_header_alone(width, height):
    with pytest.raises(InvalidRequest, match=f"at most {MAX_INPUT_PIXELS} are allowed"):
        image_size(Media("image/png", bomb(width, height)))


def test_the_header_alone_says_nothing_about_the_rest():
    cut = Media("image/png", file_of("PNG")[:-200])
    image_size(cut)
    with pytest.raises(InvalidRequest, match="cannot be decoded"):
        decode_image(cut)


def with_junk(kind: str, junk: bytes) -> bytes:
    """A picture with that before its other parts."""
    data, place = file_of(kind), {"PNG": 33, "JPEG": 2}[kind]
    return data[:place] + junk + data[place:]


def segment(data: bytes, kind: bytes = b"\xfe") -> bytes:
    return b"\xff" + kind + struct.pack(">H", 2 + len(data)) + data


@pytest.mark.parametrize(
    ("kind", "junk"),
    [
        ("PNG", (struct.pack(">I", 0) + b"juNk" + struct.pack(">I", zlib.crc32(b"juNk"))) * 500_000),
        ("JPEG", segment(b"") * 1_500_000),
        ("JPEG", b"\xff" * 6_000_000),
        ("JPEG", segment(b"") + b"\0" * 6_000_000),
        ("JPEG", segment(b"Exif\0\0" + b"x" * 600, b"\xe1") * 10_000),
    ],
    ids=["chunks", "segments", "filling", "rubbish", "exif"],
)
def test_a_picture_of_many_parts_is_refused_at_once(kind, junk):
    data = with_junk(kind, junk)
    begun_s = time.perf_counter()
    with pytest.raises(InvalidRequest, match="save it without metadata"):
        image_size(Media("image/png", data))
    assert time.perf_counter() - begun_s < 1, "each part was looked at: 4 s"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_metadata_as_programs_write_it_is_no_hindrance(kind):
    comment = {} if kind == "PNG" else {"comment": "t" * 60_000}
    data = file_of(kind, icc_profile=b"p" * 1_000_000, **comment)
    assert image_size(Media("image/png", data)) == (40, 24)
    assert decode_image(Media("image/png", data)).shape == (1, 24, 40, 3)


@pytest.mark.parametrize("data", [b"", b"GIF", b"\x89PNG\r\n\x1a\n", b"<svg/>", b"%PDF-1.7", b"\x00" * 4096])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(InvalidRequest, match="cannot be decoded"):
        image_size(Media("image/png", data))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_the_door_and_the_stages_take_the_same_formats(kind):
    """What REST lets in, a stage can decode; what a stage would refuse, REST refuses, with the same list."""
    data = file_of(kind)
    try:
        media = media_of_bytes(data, "", "image")
    except InvalidRequest as refused:
        assert all(name.lower() in refused.message for name in PICTURE_FORMATS)
        with pytest.raises(InvalidRequest, match=", ".join(PICTURE_FORMATS)):
            decode_image(Media("image/png", data))
    else:
        assert kind in PICTURE_FORMATS
        assert decode_image(media).shape == (1, 24, 40, 3)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", PICTURE_FORMATS)
def test_broken_bytes_give_pixels_or_a_refusal(kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "maker"
    whole = file_of(kind, exif=exif)
    chance, refused = random.Random(0), 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 2, 5))):
            data[chance.randrange(min(len(data), 400))] = chance.randrange(256)
        try:
            assert decode_image(Media("image/png", bytes(data[: chance.randrange(1, 2 * len(data))]))).shape[3] == 3
        except InvalidRequest:
            refused += 1
    assert refused > 0


# ---- Clips that are encoded while they are made ---------------------------------------------------------------------


def test_a_clip_in_chunks_is_the_file_of_the_whole_clip():
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    for output_format in ("mp4", "gif", "zip", "raw", "webp"):
        writer = ClipWriter(output_format, 80, 12.0, len(frames))
        for chunk in np.split(frames, (1, 5)):
            writer.add(chunk)
        assert writer.finish() == encode_frames(frames, output_format, 80, 12.0)


@pytest.mark.parametrize("size", [(64, 64), (1280, 720)], ids=["small", "large"])
def test_the_colours_of_an_mp4_are_those_that_its_marks_say(size):
    width, height = size
    colour = np.array([200, 30, 60], np.uint8)
    _, data = encode_frames(np.broadcast_to(colour, (2, height, width, 3)), "mp4", 100, 16.0)
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
        context = container.streams.video[0].codec_context
    assert (frame.colorspace, frame.color_range) == (Colorspace.ITU709, ColorRange.MPEG)
    assert (context.color_primaries, context.color_trc) == (ColorPrimaries.BT709, ColorTrc.BT709)
    # By the matrix of BT.709: Y = 0.2126 R + 0.7152 G + 0.0722 B, from 16 to 235.
    luma = 16 + 219 * (np.array([0.2126, 0.7152, 0.0722]) @ colour) / 255
    assert bytes(frame.planes[0])[0] == pytest.approx(luma, abs=1.5)
    assert np.abs(frame.to_ndarray(format="rgb24")[0, 0].astype(int) - colour).max() <= 3


def played(data: bytes) -> tuple[list[Image.Image], list[int]]:
    """The pictures of an animation, and how long each is shown, in milliseconds."""
    pictures, durations_ms = [], []
    with Image.open(io.BytesIO(data)) as image:
        for index in range(image.n_frames):
            image.seek(index)
            pictures.append(image.convert("RGB"))
            durations_ms.append(image.info["duration"])
    return pictures, durations_ms


@pytest.mark.parametrize(("output_format", "unit_ms"), [("webp", 1), ("gif", 10)])
@pytest.mark.parametrize("fps", [1.0, 16.0, 23.976, 50.0])
def test_an_animation_lasts_as_long_as_its_frames(output_format, unit_ms, fps):
    frames = np.random.default_rng(0).integers(0, 256, (33, 16, 16, 3), dtype=np.uint8)
    _, data = encode_frames(frames, output_format, 50, fps)
    _, durations_ms = played(data)
    assert len(durations_ms) == 33
    for shown in range(1, 34):
        assert abs(sum(durations_ms[:shown]) - 1000 * shown / fps) <= unit_ms / 2 + 1e-6, "no frame is ever late"


def test_a_gif_keeps_frames_that_stand_still_and_the_colours_of_each():
    frames = np.zeros((6, 24, 40, 3), np.uint8)
    frames[3:5] = [200, 30, 60]
    frames[5] = np.arange(40)[:, None]
    mime, data = encode_frames(frames, "gif", 1, 10.0)
    pictures, durations_ms = played(data)
    assert (mime, durations_ms) == ("image/gif", [100] * 6)
    shown = np.stack([np.asarray(picture) for picture in pictures])
    assert np.array_equal(shown[:5], frames[:5])
    # Pillow looks colours up in steps of four.
    assert np.abs(shown.astype(int) - frames).max() < 4
    with Image.open(io.BytesIO(data)) as image:
        assert (image.size, image.info["loop"]) == ((40, 24), 0)
    assert [picture.size for picture in played(encode_frames(frames[:1], "gif", 1, 10.0)[1])[0]] == [(40, 24)]


def test_a_zip_has_every_frame_as_it_is():
    frames = np.random.default_rng(0).integers(0, 256, (12, 24, 40, 3), dtype=np.uint8)
    mime, data = encode_frames(frames, "zip", 1, 10.0)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{index:05}.png" for index in range(12)]
        read = [np.asarray(Image.open(archive.open(name))) for name in archive.namelist()]
    assert mime == "application/zip"
    assert np.array_equal(np.stack(read), frames)


GROWTH = """
import resource, sys
import numpy as np
from services.clip_writer import ClipWriter

def peak_mib(chunks):
    writer = ClipWriter(sys.argv[1], 80, 12.0, 4 * chunks)
    for index in range(chunks):
        writer.add(np.full((4, 512, 1024, 3), index, np.uint8))
    writer.finish()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

few = peak_mib(4)
print(peak_mib(32) - few)
"""


@pytest.mark.parametrize("output_format", ["mp4", "gif", "zip"])
def test_what_is_written_frame_by_frame_does_not_hold_the_clip(output_format):
    """Of 192 MiB of frames instead of 24."""
    ended = subprocess.run([sys.executable, "-c", GROWTH, output_format], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 40


def test_what_is_encoded_at_the_end_begins_with_the_last_frame():
    writer = ClipWriter("png", 90, 0.0, 1)
    writer.add(PIXELS[None])
    assert writer._done.wait(20.0)
    assert writer.finish()[0] == "image/png"
    writer.close()


@pytest.mark.parametrize("output_format", ["mp4", "webp", "gif", "zip", "raw"])
def test_a_clip_without_all_its_frames_is_none(output_format):
    writer = ClipWriter(output_format, 90, 12.0, 5)
    writer.add(np.zeros((4, 32, 48, 3), np.uint8))
    assert writer.is_done(20.0)
    with pytest.raises(RuntimeError, match="1 of 5 frames never came"):
        writer.finish()


def test_more_frames_than_announced_hold_up_nobody():
    writer = ClipWriter("raw", 90, 12.0, 1)
    for _ in range(20):
        writer.add(PIXELS[None])
    assert writer.finish()[1] == PIXELS.tobytes()


def test_frames_are_encoded_before_the_last_has_come():
    writer = ClipWriter("mp4", 80, 12.0, 100)
    begun_s = time.monotonic()
    for _ in range(20):
        writer.add(np.zeros((1, 32, 48, 3), np.uint8))
    assert time.monotonic() - begun_s < 30, "it waits for the encoder, not for the end"
    writer.close()


def test_an_encoder_that_fails_holds_up_nobody():
    writer = ClipWriter("mp4", 80, 12.0, 100)
    for _ in range(20):
        writer.add(np.zeros((1, 31, 47, 3), np.uint8))
    with pytest.raises(Exception, match="31|47|divisible|av"):
        writer.finish()
    writer.close()


def test_the_time_that_an_encoder_is_waited_for(monkeypatch):
    monkeypatch.setattr(clip_writer, "_mp4", lambda chunks, *_: b"".join(time.sleep(0.1) or b"x" for _ in chunks))
    writer = ClipWriter("mp4", 80, 12.0, 6)
    begun_s = time.perf_counter()
    for _ in range(6):
        writer.add(PIXELS[None])
    assert writer.finish()[1] == 6 * b"x"
    assert 0 < writer.behind_s <= time.perf_counter() - begun_s


class Steps:
    """An encoder that does as it is told, and the clock that it and its writer see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1.0
        # Whether a chunk is taken while the next one is added.
        self.meanwhile = False
        self._taken, self._encoded = threading.Semaphore(0), threading.Semaphore(0)
        self._adds = threading.current_thread()
        monkeypatch.setattr(clip_writer, "_mp4", self._encode)
        monkeypatch.setattr(clip_writer.time, "perf_counter", self._clock)

    def _encode(self, chunks: Iterator[np.ndarray], *_options: object) -> bytes:
        for _ in chunks:
            self._taken.release()
            assert self._encoded.acquire(timeout=20)
        return b"clip"

    def _clock(self) -> float:
        if self.meanwhile and threading.current_thread() is self._adds:
            self.meanwhile = False
            self.encoded()
            self.take()
        return self.now_s

    def take(self) -> None:
        """Waits until the next chunk is taken."""
        assert self._taken.acquire(timeout=20)

    def encoded(self) -> None:
        """The chunk in work is."""
        self._encoded.release()


def test_it_is_waited_for_while_two_chunks_wait_and_behind_the_last(monkeypatch):
    steps = Steps(monkeypatch)
    writer = ClipWriter("mp4", 80, 12.0, 4)

    def add(now_s: float) -> None:
        steps.now_s = now_s
        writer.add(PIXELS[None])

    def encoded(now_s: float) -> None:
        steps.now_s = now_s
        steps.encoded()

    add(0.5)
    steps.take()
    add(1.0)
    add(2.0)
    assert writer.is_full()
    encoded(5.0)
    steps.take()
    assert not writer.is_full()
    add(6.0)
    steps.now_s = 7.0
    writer.end()
    encoded(9.0)
    steps.take()
    encoded(10.0)
    steps.take()
    encoded(12.0)
    assert writer.finish() == ("video/mp4", b"clip")
    assert writer.behind_s == (5.0 - 2.0) + (12.0 - 6.0)


def test_it_is_not_waited_for_when_a_chunk_is_taken_while_the_next_one_comes(monkeypatch):
    steps = Steps(monkeypatch)
    writer = ClipWriter("mp4", 80, 12.0, 3)
    writer.add(PIXELS[None])
    steps.take()
    writer.add(PIXELS[None])
    steps.meanwhile = True
    writer.add(PIXELS[None])
    assert not writer.is_full()
    steps.now_s = 3.0
    steps.encoded()
    steps.take()
    steps.encoded()
    writer.finish()
    assert writer.behind_s == 0.0
