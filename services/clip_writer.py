"""Frames and sound to encoded media: PNG, JPEG, WebP, GIF, MP4, a zip of PNGs, raw bytes; sound alone.

For the stages that make media.
"""

from __future__ import annotations

import io
import itertools
import queue
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, BinaryIO

from PIL import Image
from PIL.GifImagePlugin import getdata

from services.clip_reader import Frames
from services.sound import SOUND_MIMES, ClipSound, Sound, encode_sound, num_aac_frames

# Frames, and the sound that comes with them.
Chunk = tuple[Frames, Sound | None]

MIMES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "mp4": "video/mp4",
    "zip": "application/zip",
}
RAW_MIME = "application/octet-stream"
CHUNKS_AHEAD = 2
# Level 1 costs a sixth of the default's time for a few percent more bytes.
PNG_OPTIONS = {"compress_level": 1}
# A GIF's colours are chosen on so small a copy: a sixth of the time for 1 dB less (832x480).
PALETTE_SIDE_PX = 256


def encode_frames(frames: Frames, output_format: str, quality: int, fps: float) -> tuple[str, bytes]:
    """Frames [F, H, W, 3], or 4 with transparency, as (mime, bytes). Pictures keep the first frame only.

    Args:
        output_format: a zip has each frame as a PNG, 00000.png being the first; with transparency 00.png.
        quality: 1 to 100; lossless formats ignore it.
        fps: frames a second of a clip.
    """
    writer = ClipWriter(output_format, quality, fps, len(frames))
    writer.add(frames)
    return writer.finish()


class ClipWriter:
    """Encodes a clip on a thread of its own while its later frames are still being made.

    At most `CHUNKS_AHEAD` chunks wait for the encoder; then it `is_full`, and `add` waits too, so that memory does not
    grow with a clip that is decoded faster than it is encoded. Nothing else waits but `finish`. Give it up with `close`
    when no `finish` will come.

    Of a clip's formats, MP4 alone has sound: the others are made of the frames.

    Args:
        output_format: mp4, gif, zip, raw, or one that is encoded at the end: png and jpeg (the first frame), webp.
        quality, fps: as `encode_frames`.
        num_frames: of the whole clip; 0 of sound alone, as wav, flac or raw, which ends with `end`.
    """

    def __init__(self, output_format: str, quality: int, fps: float, num_frames: int) -> None:
        self._options = (output_format, quality, fps)
        self._num_frames = self._missing = num_frames
        # Each with the time at which it came.
        self._chunks: queue.SimpleQueue[tuple[Chunk | None, float]] = queue.SimpleQueue()
        self._room = threading.Semaphore(CHUNKS_AHEAD)
        self._given_up = self._told = self._ended = False
        self._made: tuple[str, bytes] | BaseException | None = None
        self._done = threading.Event()
        self._told_s = 0.0
        # Only the thread writes these.
        self._taken_s = self._full_s = self._full_until_s = self._done_s = 0.0
        self._thread = threading.Thread(target=self._run, name="clip writer", daemon=True)
        self._thread.start()

    def add(self, frames: Frames, sound: Sound | None = None) -> None:
        """The next frames [F, H, W, 3], and the next sound.

        A clip's sound begins with its first frames and ends with its last; in between it may come sooner or later than
        the frames that it is heard with.
        """
        self._room.acquire()
        self._chunks.put(((frames, sound), time.perf_counter()))

    def is_full(self) -> bool:
        """Whether `add` would wait, or after the last frame `finish`."""
        return not self._done.is_set() and (self._told or self._chunks.qsize() >= CHUNKS_AHEAD)

    def end(self) -> None:
        """Says that no frames follow."""
        if not self._told:
            self._told, self._told_s = True, time.perf_counter()
            self._chunks.put((None, self._told_s))

    def is_done(self, timeout_s: float = 0.0) -> bool:
        """Whether `finish` would not wait; no frames follow. Waits for that, `timeout_s` at most."""
        self.end()
        return self._done.wait(timeout_s)

    def finish(self) -> tuple[str, bytes]:
        """(mime, bytes), once all frames are encoded.

        Raises:
            Exception: what the encoder failed with, or that frames are missing.
        """
        self.end()
        self._thread.join()
        if isinstance(self._made, tuple):
            return self._made
        assert self._made is not None
        raise self._made

    @property
    def made_bytes(self) -> int:
        """Size of what `finish` gives; 0 until the encoder has ended, and when it has failed."""
        return len(self._made[1]) if self._done.is_set() and isinstance(self._made, tuple) else 0

    @property
    def behind_s(self) -> float:
        """Seconds that it was waited for: while it was full, and once it has ended, behind the last frame."""
        return self._full_s + max(0.0, self._done_s - max(self._told_s, self._full_until_s))

    def close(self) -> None:
        """Ends the thread; what was added is lost."""
        self._given_up = True
        self.end()

    def _run(self) -> None:
        output_format, quality, fps = self._options
        try:
            if not self._num_frames:
                sounds = (sound for _, sound in self._taken() if sound is not None)
                self._made = SOUND_MIMES[output_format], encode_sound(sounds, output_format)
            elif output_format == "mp4":
                self._made = MIMES["mp4"], _mp4(self._taken(), self._num_frames, quality, fps)
            elif output_format == "raw":
                self._made = RAW_MIME, b"".join(frames.tobytes() for frames, _ in self._taken())
            else:
                pictures = (Image.fromarray(frame) for frames, _ in self._taken() for frame in frames)
                self._made = MIMES[output_format], _encoded(pictures, output_format, quality, fps)
            if self._missing > 0:
                raise RuntimeError(f"{self._missing} of {self._num_frames} frames never came")
        except Exception as error:  # noqa: BLE001 - it is raised by `finish`
            self._made = error
        self._done_s = time.perf_counter()
        self._done.set()
        while not self._ended:
            # Whoever adds frames must not wait for ever.
            self._ended = self._next() is None

    def _next(self) -> Chunk | None:
        chunk, came_s = self._chunks.get()
        if chunk is not None and came_s < self._taken_s:
            # Both waited from then on, until the one before was taken: it was full.
            self._full_s += self._taken_s - came_s
            self._full_until_s = self._taken_s
        self._taken_s = time.perf_counter()
        self._room.release()
        return chunk

    def _taken(self) -> Iterator[Chunk]:
        """The chunks, up to the last frame: what is to be done at the end begins before `finish` is called."""
        while (self._missing > 0 or not self._num_frames) and not self._ended:
            chunk = self._next()
            self._ended = chunk is None
            if chunk is not None and not self._given_up:
                self._missing -= len(chunk[0])
                yield chunk


def _encoded(pictures: Iterator[Image.Image], output_format: str, quality: int, fps: float) -> bytes:
    file = io.BytesIO()
    if output_format == "zip":
        _write_zip(file, pictures)
    elif output_format == "gif":
        _write_gif(file, pictures, fps)
    else:
        _write_whole(file, pictures, output_format, quality, fps)
    return file.getvalue()


def _write_zip(file: BinaryIO, pictures: Iterator[Image.Image]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for index, picture in enumerate(pictures):
            # Layers, which alone are transparent, are few.
            digits = 2 if picture.mode == "RGBA" else 5
            with archive.open(f"{index:0{digits}}.png", "w") as entry:
                picture.save(entry, "PNG", **PNG_OPTIONS)


def _write_gif(file: BinaryIO, pictures: Iterator[Image.Image], fps: float) -> None:
    """Frame after frame, each with its own colours. Pillow's own writer holds all, and leaves out what stands still."""
    starts_cs = (round(100 * index / fps) for index in itertools.count())
    for picture, (start, end) in zip(pictures, itertools.pairwise(starts_cs), strict=False):
        if not start:
            # No colours for all, and a loop for ever.
            file.write(b"GIF89a" + struct.pack("<HHBBB", picture.width, picture.height, 0, 0, 0))
            file.write(b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")
        small = picture.copy()
        small.thumbnail((PALETTE_SIDE_PX, PALETTE_SIDE_PX), Image.Resampling.NEAREST)
        drawn = picture.quantize(palette=small.quantize(), dither=Image.Dither.NONE)
        file.writelines(getdata(drawn, duration=10 * (end - start), include_color_table=True))
    file.write(b";")


def _write_whole(file: BinaryIO, pictures: Iterator[Image.Image], output_format: str, quality: int, fps: float) -> None:
    """What Pillow writes at once: a picture, or a WebP of all."""
    first, *more = pictures
    options: dict[str, dict[str, Any]] = {
        "png": PNG_OPTIONS,
        "jpeg": {"quality": quality},
        "webp": {"quality": quality, "method": 2},
    }
    if output_format == "webp" and more:
        # Whole milliseconds each, which do not drift apart from the rate.
        starts_ms = [round(1000 * index / fps) for index in range(len(more) + 2)]
        durations_ms = [end - start for start, end in itertools.pairwise(starts_ms)]
        options["webp"] |= {"save_all": True, "append_images": more, "duration": durations_ms}
    first.save(file, output_format.upper(), **options[output_format])


def _mp4(chunks: Iterator[Chunk], num_frames: int, quality: int, fps: float) -> bytes:
    import av

    file = io.BytesIO()
    open_container: Callable[..., Any] = av.open
    rate = Fraction(fps).limit_denominator(1000)
    first = next(chunks, None)
    if first is None:
        raise RuntimeError(f"none of {num_frames} frames came")
    (_, height, width, _), begin = first[0].shape, first[1]
    entries = num_frames if begin is None else num_frames + num_aac_frames(begin, num_frames / rate)
    # The index comes first, so that a player can begin before the end has come; an entry takes less than 64 bytes. What
    # is heard at a time stands beside what is seen, however much sooner or later it came.
    options = {"moov_size": str(4096 + 64 * entries), "max_interleave_delta": "0"}
    with open_container(file, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        _mark_colours(stream.codec_context)
        stream.options = {"crf": str(round(40 - 0.3 * quality)), "preset": "veryfast"}
        track = None if begin is None else ClipSound(container, begin, num_frames / rate)
        for frames, sound in itertools.chain((first,), chunks):
            for pixels in frames:
                container.mux(stream.encode(_bt709(av.VideoFrame.from_ndarray(pixels, format="rgb24"))))
            if sound is not None:
                if track is None:
                    raise RuntimeError("a clip has sound that did not begin with its first frames")
                track.add(sound)
        container.mux(stream.encode())
        if track is not None:
            track.end()
    return file.getvalue()


def _mark_colours(context: Any) -> None:
    """Players guess what a file does not say, and guess another way for large pictures than for small ones."""
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709


def _bt709(frame: Any) -> Any:
    """RGB as what `_mark_colours` promises."""
    from av.video.reformatter import ColorRange, Colorspace

    return frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
