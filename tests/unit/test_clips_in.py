"""Clips from outside: the first frames that are wanted, or InvalidRequest, whatever the bytes are."""

from __future__ import annotations

import io
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from services import clip_reader
from services.clip_reader import ClipReading, Frames, read_frames
from services.clip_writer import encode_frames
from services.errors import DeviceLost, Internal, InvalidRequest
from services.media import decode_inputs, first_picture
from services.request import Media
from tests.oracle.wan import clip, picture
from tests.unit.mp4_boxes import clip_of_claims


def decode_clip(media: Media, max_frames: int) -> Frames:
    [frames] = ClipReading([media], max_frames).frames()
    return frames


def coded(codec: str, container: str = "mp4", sizes: tuple[tuple[int, int], ...] = ((64, 48),) * 5) -> bytes:
    """Grey frames of these sizes."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=8)
        stream.width, stream.height = sizes[0]
        stream.options = {"g": str(len(sizes)), "sc_threshold": "0"}
        for index, (width, height) in enumerate(sizes):
            pixels = np.full((height, width, 3), 40 * index % 256, np.uint8)
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


def with_unseen(frames: int) -> bytes:
    """A clip whose edit list begins with the last but one of so many frames, and only the first is a key frame."""
    grey = coded("libx264", sizes=((64, 48),) * frames)
    clip_bytes = bytearray(grey)
    edit, media = clip_bytes.index(b"elst") + 12, clip_bytes.index(b"mdhd") + 16
    length = struct.unpack_from(">I", clip_bytes, media + 4)[0]
    struct.pack_into(">III", clip_bytes, edit, 200, length // frames * (frames - 2), 0x10000)
    return bytes(clip_bytes)


def test_frames_that_are_decoded_and_not_shown_are_counted():
    """An edit list may begin behind any number of them, each a few bytes and some milliseconds."""
    assert len(decode_clip(Media("", with_unseen(300), "video"), 5)) == 2
    with pytest.raises(InvalidRequest, match="more than 500 frames that are not shown"):
        decode_clip(Media("", with_unseen(520), "video"), 5)


@pytest.mark.parametrize(
    ("end", "error", "says"),
    [
        ("echo no module named av >&2; exit 1", Internal, "the log has the trace"),
        ("kill -SEGV $$", Internal, "the log has the trace"),
        ("kill -XCPU $$", InvalidRequest, "within 2048 MiB of memory and 10 s"),
        ("kill -KILL $$", DeviceLost, "was killed"),
        ("exec sleep 30", DeviceLost, "was killed"),
    ],
)
def test_only_a_reader_that_runs_out_of_time_is_the_clips_fault(monkeypatch, tmp_path, caplog, end, error, says):
    reader = tmp_path / "reader"
    reader.write_text(f"#!/bin/sh\nexec 0<&-\n{end}\n")
    reader.chmod(0o700)
    monkeypatch.setattr(clip_reader.sys, "executable", str(reader))
    monkeypatch.setattr(clip_reader, "MAX_WALL_S", 2.0)
    with pytest.raises(error, match=says):
        decode_clip(clip(64, 48, 5, 1), 5)
    assert ("no module named av" in caplog.text) == ("no module" in end)


def test_of_what_a_reader_says_the_end_is_kept(monkeypatch, tmp_path, caplog):
    reader = tmp_path / "reader"
    reader.write_text("#!/bin/sh\nhead -c 1000000 /dev/zero >&2; echo the end >&2\n")
    reader.chmod(0o700)
    monkeypatch.setattr(clip_reader.sys, "executable", str(reader))
    with pytest.raises(Internal):
        decode_clip(clip(64, 48, 5, 1), 5)
    assert "the end" in caplog.text and len(caplog.text) < 20_000


def test_a_reader_that_cannot_be_started_fails_its_clips_alone():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        reading = ClipReading([clip(64, 48, 5, 1)], 5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert reading.is_done()
    reading.close()
    with pytest.raises(DeviceLost, match=r"could not be started .*Too many open files"):
        reading.frames()


def test_two_clips_are_read_one_after_the_other_and_the_second_may_be_refused():
    one, two = clip(64, 48, 5, 1), clip(32, 16, 3, 2)
    assert [frames.shape for frames in ClipReading([one, two], 4).frames()] == [(4, 48, 64, 3), (3, 16, 32, 3)]
    with pytest.raises(InvalidRequest, match="coded as mpeg2video"):
        ClipReading([one, Media("", coded("mpeg2video"), "mask")], 4).frames()


STARTS_A_READER = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-m", "services.clip_reader", "5", "1000", "10"]).pid, flush=True)
signal.pause()
"""


def test_a_reader_ends_with_its_rank_and_heeds_signals():
    """It waits for bytes that never come, from a pipe that is held here."""
    rank = subprocess.Popen(
        [sys.executable, "-c", STARTS_A_READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with rank:
        reader = psutil.Process(int(rank.stdout.readline()))
        begun_s = time.monotonic()
        while ignores_sigterm(reader.pid):
            assert time.monotonic() - begun_s < 30
            time.sleep(0.02)
        while reader.rlimit(psutil.RLIMIT_CPU) != (20, 21):
            assert time.monotonic() - begun_s < 30, "each clip has its time"
            time.sleep(0.02)
        rank.kill()
        gone, _ = psutil.wait_procs([reader], 5)
        assert gone


def ignores_sigterm(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    ignored = next(int(line.split()[1], 16) for line in lines if line.startswith("SigIgn"))
    return bool(ignored >> (signal.SIGTERM - 1) & 1)


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
