"""Clips from outside, read by a process of its own: `python -m services.clip_reader MAX_FRAMES BYTES ...`.

A few hundred bytes of MP4 can claim a hundred million frames, or tables that unpack to gigabytes, and FFmpeg makes room
for them before it looks for the first frame; others have it decode for minutes what nobody is to see. Here the kernel
bounds what that takes, and a process that holds a model only hears that it was too much.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from services.errors import DeviceLost, InvalidRequest, ServiceError
from services.request import Media

Frames = np.ndarray[Any, np.dtype[np.uint8]]  # [F, H, W, 3], RGB, 0 to 255
# Of all frames that are read of a clip: 81 of 1920x1080.
MAX_CLIP_PIXELS = 192 * 1024 * 1024
CLIP_CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d", "mpeg4")
# All frames of MAX_CLIP_PIXELS take 0.6 GB, those that a decoder keeps for reference as much again.
MAX_BYTES = 2 * 1024**3
# For each clip of a request, of all together. 81 frames of 1920x1080 of noise take 1.2 s as H.264, 3.8 s as H.265.
MAX_CPU_S = 10
# Of the clock, for as many clips, on a machine that has much else to do.
MAX_WALL_S = 40.0
# Frames that are decoded and not seen: where a clip was cut without coding it anew, those since the last key frame,
# 250 at most with the usual encoders.
MAX_UNSEEN = 500
# Of what the process that reads says on stderr, the last.
MAX_SAID_BYTES = 4096
PR_SET_PDEATHSIG = 1


class ClipReading:
    """Clips that are being read, beside everything else that this process does.

    Args:
        max_frames: so many of each, the first ones.
    """

    def __init__(self, clips: Sequence[Media], max_frames: int) -> None:
        self._clips = clips
        self._outcome: list[Frames] | ServiceError = _lost("did not end as it should")
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._read, name="clip reader", daemon=True)
        sizes = [str(len(clip.data)) for clip in clips]
        command = [sys.executable, "-m", "services.clip_reader", str(max_frames), *sizes]
        try:
            # Started here: it ends with the thread that starts it.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            self._thread.start()
        except (OSError, RuntimeError) as error:
            # No memory, process, thread or file is to be had: it hits this request, and no other.
            self._outcome = _lost(f"could not be started ({error})")
            self.close()

    def is_done(self) -> bool:
        """Whether `frames` waits for nothing."""
        return not self._thread.is_alive()

    def frames(self) -> list[Frames]:
        """The first frames of each clip, [F, H, W, 3], F at most `max_frames`.

        Raises:
            InvalidRequest: as `read_frames`, or reading them takes more than MAX_BYTES or MAX_CPU_S.
            DeviceLost: the process that read them could not be started, was killed, or had no time within MAX_WALL_S.
            Internal: it ended in another way; the log has what it said.
        """
        if self._thread.ident is not None:
            self._thread.join()
        if isinstance(self._outcome, ServiceError):
            raise self._outcome
        return self._outcome

    def close(self) -> None:
        """Ends it; nobody wants the frames."""
        if self._process is not None:
            self._process.kill()

    def _read(self) -> None:
        assert self._process is not None
        answer: list[Frames] | InvalidRequest | None = None
        said = bytearray()
        timer = threading.Timer(MAX_WALL_S * len(self._clips), self._process.kill)
        timer.daemon = True
        # Where it has ended early, its exit code says why.
        with contextlib.suppress(OSError, ValueError), self._process as process:
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            timer.start()
            listener = threading.Thread(target=_keep_end, args=(process.stderr, said), daemon=True)
            listener.start()
            try:
                process.stdin.write(b"".join(clip.data for clip in self._clips))
                process.stdin.close()
                answer = [_answered(process.stdout) for _ in self._clips]
            except InvalidRequest as refused:
                answer = refused
                process.kill()
            finally:
                process.stdout.close()
                listener.join()
        timer.cancel()
        self._outcome = _failure(self._process.returncode, said) if answer is None else answer


def _keep_end(stream: IO[bytes], end: bytearray) -> None:
    """Reads all of it, so that its writer never waits, and keeps the last of it."""
    while piece := os.read(stream.fileno(), MAX_SAID_BYTES):
        end += piece
        del end[:-MAX_SAID_BYTES]


def _failure(exit_code: int, said: bytearray) -> ServiceError:
    """Why it has not answered."""
    if exit_code == -signal.SIGXCPU:
        return _too_much()
    if exit_code == -signal.SIGKILL:
        return _lost("was killed")
    # Not for the process that reads: it takes as long to import as all else.
    from services.telemetry import internal_error

    return internal_error(RuntimeError(f"the clip reader ended with {exit_code}: {said.decode(errors='replace')}"))


def _lost(what: str) -> DeviceLost:
    return DeviceLost(f"the process that reads an input clip {what}; the request can run again")


def _answered(answer: IO[bytes]) -> Frames:
    """The next clip's frames.

    Raises:
        InvalidRequest: what it was refused with.
        ValueError: the answer ends too early.
    """
    head = json.loads(answer.readline())
    if refusal := head.get("refusal"):
        raise InvalidRequest(refusal, param="inputs")
    frames: Frames = np.empty(head["shape"], np.uint8)
    if answer.readinto(frames.data.cast("B")) < frames.nbytes:  # type: ignore[attr-defined]
        raise ValueError("the answer ends too early")
    return frames


def _too_much() -> InvalidRequest:
    return InvalidRequest(
        f"an input clip cannot be read within {MAX_BYTES >> 20} MiB of memory and {MAX_CPU_S} s: send a whole MP4 "
        "file of ordinary frames",
        param="inputs",
    )


def read_frames(data: bytes, max_frames: int) -> list[Frames]:
    """The first frames of a clip, [H, W, 3] each, read in this process.

    Raises:
        InvalidRequest: not an MP4 file, with another coding than CLIP_CODECS, damaged, without frames, with more pixels
            in so many frames than MAX_CLIP_PIXELS, or with more than MAX_UNSEEN frames that are not shown.
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
            frames = _frames(_decoded(container, stream, max_frames), (stream.height, stream.width), max_frames)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        # FFmpeg's own errors have a number and a function beside what they say.
        why = getattr(error, "strerror", None) or error
        raise InvalidRequest(
            f"an input clip cannot be decoded ({why}): send a whole MP4 file", param="inputs"
        ) from error
    if not frames:
        raise InvalidRequest("an input clip has 0 frames: send a whole MP4 file", param="inputs")
    return frames


def _decoded(container: Any, stream: Any, max_frames: int) -> Iterator[Any]:
    for number, packet in enumerate(container.demux(stream)):
        if number == max_frames + MAX_UNSEEN:
            raise InvalidRequest(
                f"an input clip has more than {MAX_UNSEEN} frames that are not shown: code it anew without them",
                param="inputs",
            )
        yield from packet.decode()


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


def main(max_frames: int, sizes: Sequence[int]) -> None:
    """For each clip a line of JSON, a "refusal" or the "shape" of its frames, and then their bytes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # A rank ignores it, and what it starts inherits that.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    # At the second of the two it would be killed as by any other.
    cpu_s = MAX_CPU_S * len(sizes)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    clips = [sys.stdin.buffer.read(size) for size in sizes]
    for clip in clips:
        _answer(clip, max_frames)


def _answer(clip: bytes, max_frames: int) -> None:
    answer = sys.stdout.buffer
    try:
        frames = read_frames(clip, max_frames)
        answer.write(json.dumps({"shape": (len(frames), *frames[0].shape)}).encode() + b"\n")
        for frame in frames:
            answer.write(frame.tobytes())
    except InvalidRequest as refused:
        answer.write(json.dumps({"refusal": refused.message}).encode() + b"\n")
    except MemoryError:
        answer.write(json.dumps({"refusal": _too_much().message}).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(size) for size in sys.argv[2:]])
