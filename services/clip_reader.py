"""Clips from outside, read by a process of its own: `python -m services.clip_reader MAX_FRAMES`, MP4 in, frames out.

A few hundred bytes of MP4 can claim a hundred million frames, or tables that unpack to gigabytes, and FFmpeg makes room
for them before it looks for the first frame. Here the kernel bounds what that takes, and a process that holds a model
only hears that it was too much.
"""

from __future__ import annotations

import io
import itertools
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from services.errors import InvalidRequest
from services.request import Media

Frames = np.ndarray[Any, np.dtype[np.uint8]]  # [F, H, W, 3], RGB, 0 to 255
# Of all frames that are read of a clip: 81 of 1920x1080.
MAX_CLIP_PIXELS = 192 * 1024 * 1024
CLIP_CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d", "mpeg4")
# All frames of MAX_CLIP_PIXELS take 0.6 GB, those that a decoder keeps for reference as much again.
MAX_BYTES = 2 * 1024**3
MAX_CPU_S = 60


def decode_clip(media: Media, max_frames: int) -> Frames:
    """The first frames of an MP4 file, [F, H, W, 3], F at most `max_frames`.

    Raises:
        InvalidRequest: as `read_frames`, or reading it takes more than MAX_BYTES or MAX_CPU_S.
    """
    command = [sys.executable, "-m", "services.clip_reader", str(max_frames)]
    reader = subprocess.run(command, input=media.data, capture_output=True, check=False)
    head_bytes = reader.stdout.find(b"\n") + 1
    if reader.returncode or not head_bytes:
        raise InvalidRequest(
            f"an input clip cannot be read within {MAX_BYTES >> 20} MiB of memory and {MAX_CPU_S} s: send a whole MP4 "
            "file of ordinary frames",
            param="inputs",
        )
    answer = json.loads(reader.stdout[:head_bytes])
    if refusal := answer.get("refusal"):
        raise InvalidRequest(refusal, param="inputs")
    return np.frombuffer(reader.stdout, np.uint8, offset=head_bytes).reshape(answer["shape"])


def read_frames(data: bytes, max_frames: int) -> list[Frames]:
    """What `decode_clip` gives, [H, W, 3] each, read in this process.

    Raises:
        InvalidRequest: not an MP4 file, with another coding than CLIP_CODECS, damaged, without frames, or with more
            pixels in so many frames than MAX_CLIP_PIXELS.
    """
    import av

    try:
        # The one demuxer, which reads no other files.
        with av.open(io.BytesIO(data), "r", format="mp4") as container:
            if not container.streams.video:
                raise InvalidRequest("an input clip has no pictures", param="inputs")
            stream = container.streams.video[0]
            # A coding that nobody knows has no context.
            coding = getattr(stream.codec_context, "name", "unknown")
            if coding not in CLIP_CODECS:
                raise InvalidRequest(
                    f"an input clip is coded as {coding}: send {', '.join(CLIP_CODECS)}", param="inputs"
                )
            frames = _frames(container.decode(stream), (stream.height, stream.width), max_frames)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise InvalidRequest(
            f"an input clip cannot be decoded ({error}): send a whole MP4 file", param="inputs"
        ) from error
    if not frames:
        raise InvalidRequest("an input clip has 0 frames", param="inputs")
    return frames


def _frames(decoded: Iterator[Any], size: tuple[int, int], max_frames: int) -> list[Frames]:
    height, width = size
    if height * width * max_frames > MAX_CLIP_PIXELS:
        raise InvalidRequest(
            f"an input clip has {width}x{height} pixels: at most {MAX_CLIP_PIXELS // max_frames} are allowed in each "
            f"of {max_frames} frames",
            param="inputs",
        )
    frames: list[Frames] = []
    for frame in itertools.islice(decoded, max_frames):
        if (frame.height, frame.width) != size:
            raise InvalidRequest(
                f"an input clip changes its size from {width}x{height} to {frame.width}x{frame.height}", param="inputs"
            )
        if frame.is_corrupt:
            raise InvalidRequest(f"an input clip is damaged at frame {len(frames) + 1}", param="inputs")
        frames.append(frame.to_ndarray(format="rgb24"))
    return frames


def main(max_frames: int) -> None:
    """Answers with a line of JSON, a "refusal" or the "shape" of the frames, and then with their bytes."""
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer = sys.stdout.buffer
    try:
        frames = read_frames(sys.stdin.buffer.read(), max_frames)
    except InvalidRequest as refused:
        answer.write(json.dumps({"refusal": refused.message}).encode() + b"\n")
        return
    answer.write(json.dumps({"shape": (len(frames), *frames[0].shape)}).encode() + b"\n")
    for frame in frames:
        answer.write(frame.tobytes())


if __name__ == "__main__":
    main(int(sys.argv[1]))
