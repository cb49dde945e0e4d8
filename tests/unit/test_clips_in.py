"""Clips from outside: the first frames that are wanted, or InvalidRequest, whatever the bytes are."""

from __future__ import annotations

import io
import random
import resource
import time

import av
import numpy as np
import pytest

from services import clip_reader
from services.clip_reader import decode_clip, read_frames
from services.clip_writer import encode_frames
from services.errors import InvalidRequest
from services.media import decode_inputs, first_picture
from services.request import Media
from tests.oracle.wan import clip, picture
from tests.unit.mp4_boxes import clip_of_claims


def coded(codec: str, container: str = "mp4", sizes: tuple[tuple[int, int], ...] = ((64, 48),) * 5) -> bytes:
    """Grey frames of these sizes."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=8)
        stream.width, stream.height = sizes[0]
        for index, (width, height) in enumerate(sizes):
            pixels = np.full((height, width, 3), 40 * index, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def test_the_frames_are_those_that_were_sent():
    frames = np.zeros((6, 48, 64, 3), np.uint8) + np.arange(6, dtype=np.uint8)[:, None, None, None] * 40
    made = Media(*encode_frames(frames, "mp4", 100, 8.0), "video")
    decoded = decode_clip(made, 6)
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames.astype(int)).max() <= 4
    assert np.array_equal(decode_clip(made, 4), decoded[:4])
    assert len(decode_clip(made, 81)) == 6


def test_masks_may_be_clips_or_pictures():
    inputs = [clip(64, 48, 5, 1), clip(64, 48, 5, 2, "mask"), picture(8, 9, 1), picture(10, 11, 2)]
    decoded = decode_inputs(inputs, 3)
    assert {role: [frames.shape for frames in given] for role, given in decoded.items()} == {
        "video": [(3, 48, 64, 3)],
        "mask": [(3, 48, 64, 3)],
        "image": [(1, 9, 8, 3), (1, 11, 10, 3)],
    }
    assert decode_inputs([picture(8, 9, 1, "mask")], 3)["mask"][0].shape == (1, 9, 8, 4)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "cannot be decoded"),
        (b"\0\0\0\x18ftypisom" + b"\0" * 100, "cannot be decoded"),
        (coded("mpeg2video"), "coded as mpeg2video"),
        (coded("libx264", "matroska"), "cannot be decoded"),
        (sound(), "no pictures"),
        (clip(64, 48, 5, 1).data[:1000], "0 frames"),
        (picture(8, 8, 1).data, "cannot be decoded"),
    ],
    ids=["empty", "only a head", "coding", "container", "sound", "cut", "picture"],
)
def test_what_is_no_clip_is_refused(data, says):
    with pytest.raises(InvalidRequest, match=says):
        decode_clip(Media("video/mp4", data, "video"), 5)


def test_a_playlist_that_names_other_files_is_not_followed(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(clip(64, 48, 5, 1).data)
    for text in (
        f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n",
        f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret.mp4\n",
    ):
        with pytest.raises(InvalidRequest, match="cannot be decoded"):
            decode_clip(Media("video/mp4", text.encode(), "video"), 5)


def test_more_pixels_than_allowed_are_refused_before_any_is_decoded(monkeypatch):
    data = coded("libx264", sizes=((1920, 1088),) * 2)
    assert decode_clip(Media("video/mp4", data, "video"), 81).shape == (2, 1088, 1920, 3)
    monkeypatch.setattr(clip_reader, "MAX_CLIP_PIXELS", 81 * 1920 * 1088 - 1)
    start_s = time.perf_counter()
    with pytest.raises(InvalidRequest, match="1920x1088 pixels: at most 2088959 are allowed in each of 81 frames"):
        read_frames(data, 81)
    assert time.perf_counter() - start_s < 0.5


@pytest.mark.parametrize(("samples", "edits"), [(100_000_000, 0), (20_000, 20_000)], ids=["frames", "edits"])
def test_a_clip_of_claims_takes_no_memory_of_this_process(samples, edits):
    bomb = clip_of_claims(samples, edits)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequest, match="cannot be decoded|0 frames"):
        decode_clip(Media("video/mp4", bomb, "video"), 5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 64 * 1024


def test_a_reader_that_dies_refuses_the_clip(monkeypatch):
    monkeypatch.setattr(clip_reader.sys, "executable", "/bin/false")
    with pytest.raises(InvalidRequest, match="within 2048 MiB of memory and 60 s"):
        decode_clip(clip(64, 48, 5, 1), 5)


def test_damage_is_refused_or_harmless():
    whole, chance = clip(64, 48, 9, 1).data, random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 20)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        data = bytes(damaged[: chance.randrange(1, len(damaged) + 1)])
        try:
            frames = read_frames(data, 9)
        except InvalidRequest:
            continue
        assert {frame.dtype for frame in frames} == {np.dtype(np.uint8)}
        assert 1 <= len(frames) <= 9


def test_a_gateway_looks_at_the_first_bytes_of_a_clip_only():
    head = Media("", b"\0\0\0\x18ftypisom", "video")
    assert first_picture([head, Media("", head.data, "mask"), picture(30, 20, 1)]) == (30, 20)
    with pytest.raises(InvalidRequest, match="no MP4"):
        first_picture([picture(30, 20, 1, "video")])
    with pytest.raises(InvalidRequest, match="cannot be decoded"):
        first_picture([Media("", head.data, "image")])
