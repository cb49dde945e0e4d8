"""Encoded media: pictures from outside to pixels, frames to PNG, JPEG, WebP, MP4 or raw bytes.

Pixels are decoded in rank processes only; gateways look at headers.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import queue
import struct
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from services.errors import InvalidRequest
from services.request import Limits, Media

Frames = np.ndarray[Any, np.dtype[np.uint8]]  # [F, H, W, 3], RGB, 0 to 255
PICTURE_ROLES = ("image", "last_image", "mask")
# Of all frames that are read of a clip: 81 of 1920x1080.
MAX_CLIP_PIXELS = 192 * 1024 * 1024
CLIP_CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d", "mpeg4")
MAX_INPUT_PIXELS = 64 * 1024 * 1024
# What clients may send, by the name that they know it by.
INPUT_MIMES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "mp4": "video/mp4",
    "wav": "audio/wav",
    "flac": "audio/flac",
}
PICTURE_FORMATS = tuple(name.upper() for name, mime in INPUT_MIMES.items() if mime.startswith("image/"))
MIMES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4", "zip": "application/zip"}
RAW_MIME = "application/octet-stream"
CHUNKS_AHEAD = 2

# EXIF orientation -> what brings the picture upright. The library's own function also rewrites the EXIF block, and
# raises anything on a broken one.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = [_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]


def media_type(data: bytes) -> str | None:
    """The MIME type that the first bytes of a file tell; None when it is not among INPUT_MIMES."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return INPUT_MIMES["png"]
    if data.startswith(b"\xff\xd8\xff"):
        return INPUT_MIMES["jpeg"]
    if data[:4] == b"RIFF" and data[8:12] in (b"WEBP", b"WAVE"):
        return INPUT_MIMES["webp" if data[8:12] == b"WEBP" else "wav"]
    if data[4:8] == b"ftyp":
        return INPUT_MIMES["mp4"]
    return INPUT_MIMES["flac"] if data.startswith(b"fLaC") else None


def first_picture(inputs: Sequence[Media]) -> tuple[int, int] | None:
    """(width, height) of the first picture among a generation's inputs, when there is one; all headers are checked.

    Raises:
        InvalidRequest: as image_size.
    """
    clips = [media for media in inputs if media.role == "video" or (media.role == "mask" and _is_clip(media))]
    for media in clips:
        if not _is_clip(media):
            raise InvalidRequest("an input of the role video is no MP4 file: send one", param="inputs")
    sizes = [image_size(media) for media in inputs if media.role in PICTURE_ROLES and media not in clips]
    return sizes[0] if sizes else None


def image_size(media: Media) -> tuple[int, int]:
    """(width, height) of a picture as `decode_image` gives it, by its header alone.

    Raises:
        InvalidRequest: not a picture, of another format, or with more pixels than allowed.
    """
    with _opened(media) as image:
        on_its_side = _turn(image) in _SIDEWAYS
        return (image.height, image.width) if on_its_side else (image.width, image.height)


def check_mask(inputs: Sequence[Media], limits: Limits) -> None:
    """Whether a picture's mask has its size and transparency, by their headers alone; of a clip's mask nothing.

    Raises:
        InvalidRequest: it has not, or as image_size.
    """
    masks = [media for media in inputs if media.role == "mask"]
    pictures = [media for media in inputs if media.role == "image"]
    if not masks or not pictures or limits.output != "image":
        return
    (width, height), size = image_size(pictures[0]), image_size(masks[0])
    if size != (width, height):
        raise InvalidRequest(
            f"the mask has {size[0]}x{size[1]} pixels: the (first) picture has {width}x{height}, and the mask must "
            "have as many",
            param="inputs",
        )
    with _opened(masks[0]) as image:
        # Pillow's own property asserts that a picture with a palette brought one.
        if "A" not in image.getbands() and "transparency" not in image.info:
            raise InvalidRequest(
                "the mask has no transparency: send a PNG or WebP that is transparent where the picture is to be "
                "edited",
                param="inputs",
            )


def decode_image(media: Media, *, alpha: bool = False) -> Frames:
    """A picture's pixels as [1, H, W, 3], upright as its EXIF data say; with `alpha` [1, H, W, 4], 255 for opaque.

    Raises:
        InvalidRequest: as image_size, or cut short.
    """
    with _opened(media) as image:
        turn = _turn(image)
        upright = image if turn is None else image.transpose(turn)
        return np.asarray(upright.convert("RGBA" if alpha else "RGB"))[None].copy()


def decode_inputs(inputs: Sequence[Media], max_frames: int = 1, *, alpha: bool = False) -> dict[str, list[Frames]]:
    """The pixels of all inputs by role, each [F, H, W, 3]; of clips the first `max_frames`.

    Pictures have a fourth channel with `alpha`, and as masks.

    Raises:
        InvalidRequest: as decode_image and decode_clip.
    """
    decoded: dict[str, list[Frames]] = {}
    for media in inputs:
        clip = media.role == "video" or (media.role == "mask" and _is_clip(media))
        frames = decode_clip(media, max_frames) if clip else decode_image(media, alpha=alpha or media.role == "mask")
        decoded.setdefault(media.role, []).append(frames)
    return decoded


def decode_clip(media: Media, max_frames: int) -> Frames:
    """The first frames of an MP4 file, [F, H, W, 3], F at most `max_frames`.

    Raises:
        InvalidRequest: not an MP4 file, with another coding than CLIP_CODECS, damaged, without frames, or with more
            pixels in so many frames than MAX_CLIP_PIXELS.
    """
    import av

    try:
        # The one demuxer, which reads no other files.
        with av.open(io.BytesIO(media.data), "r", format="mp4") as container:
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
    return np.stack(frames)


def _frames(decoded: Iterator[Any], size: tuple[int, int], max_frames: int) -> list[Any]:
    height, width = size
    if height * width * max_frames > MAX_CLIP_PIXELS:
        raise InvalidRequest(
            f"an input clip has {width}x{height} pixels: at most {MAX_CLIP_PIXELS // max_frames} are allowed in each "
            f"of {max_frames} frames",
            param="inputs",
        )
    frames: list[Any] = []
    for frame in itertools.islice(decoded, max_frames):
        if (frame.height, frame.width) != size:
            raise InvalidRequest(
                f"an input clip changes its size from {width}x{height} to {frame.width}x{frame.height}", param="inputs"
            )
        if frame.is_corrupt:
            raise InvalidRequest(f"an input clip is damaged at frame {len(frames) + 1}", param="inputs")
        frames.append(frame.to_ndarray(format="rgb24"))
    return frames


def _is_clip(media: Media) -> bool:
    return media_type(media.data) == INPUT_MIMES["mp4"]


def _turn(image: Image.Image) -> Image.Transpose | None:
    # `image.getexif` would decode a PNG's pixels to look for EXIF data behind them.
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        return _UPRIGHT.get(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - a broken EXIF block raises anything; the pixels may be fine
        return None


@contextlib.contextmanager
def _opened(media: Media) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(media.data), formats=PICTURE_FORMATS) as image:
                if image.width * image.height > MAX_INPUT_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidRequest(
            f"an input picture has too many pixels ({error}): at most {MAX_INPUT_PIXELS} are allowed", param="inputs"
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, struct.error) as error:
        raise InvalidRequest(
            f"an input picture cannot be decoded ({error}): send a whole {', '.join(PICTURE_FORMATS)} file",
            param="inputs",
        ) from error


def encode_frames(frames: Frames, output_format: str, quality: int, fps: float) -> tuple[str, bytes]:
    """Frames [F, H, W, 3], or 4 with transparency, as (mime, bytes). Pictures keep the first frame only.

    Args:
        output_format: a zip has each frame as a PNG, 00.png being the first.
        quality: 1 to 100; lossless formats ignore it.
        fps: frames a second of a clip.
    """
    if output_format in ("raw", "mp4"):
        writer = ClipWriter(output_format, quality, fps, len(frames))
        writer.add(frames)
        return writer.finish()
    file = io.BytesIO()
    if output_format == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            for index, frame in enumerate(frames):
                archive.writestr(f"{index:02}.png", encode_frames(frame[None], "png", quality, fps)[1])
        return MIMES["zip"], file.getvalue()
    first, *more = (Image.fromarray(frame) for frame in frames)
    options: dict[str, dict[str, Any]] = {
        # Level 1 costs a sixth of the default's time for a few percent more bytes.
        "png": {"compress_level": 1},
        "jpeg": {"quality": quality},
        "webp": {"quality": quality, "method": 2},
    }
    if output_format == "webp" and more:
        options["webp"] |= {"save_all": True, "append_images": more, "duration": round(1000 / fps)}
    first.save(file, output_format.upper(), **options[output_format])
    return MIMES[output_format], file.getvalue()


class ClipWriter:
    """Encodes a clip on a thread of its own while its later frames are still being made.

    At most `CHUNKS_AHEAD` chunks wait for the encoder; then `add` waits too, so that memory does not grow with a clip
    that is decoded faster than it is encoded. Give it up with `close` when no `finish` will come.

    Args:
        output_format: mp4, raw, or one that is encoded at the end: png and jpeg (the first frame), webp.
        quality, fps: as `encode_frames`.
        num_frames: of the whole clip.
    """

    def __init__(self, output_format: str, quality: int, fps: float, num_frames: int) -> None:
        self._options = (output_format, quality, fps)
        self._num_frames = num_frames
        self._chunks: queue.Queue[Frames | None] = queue.Queue(CHUNKS_AHEAD)
        self._given_up = self._ended = False
        self._made: tuple[str, bytes] | BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="clip writer", daemon=True)
        self._thread.start()

    def add(self, frames: Frames) -> None:
        """The next frames [F, H, W, 3]."""
        self._chunks.put(frames)

    def finish(self) -> tuple[str, bytes]:
        """(mime, bytes), once all frames are encoded.

        Raises:
            Exception: what the encoder failed with.
        """
        self._chunks.put(None)
        self._thread.join()
        if isinstance(self._made, tuple):
            return self._made
        assert self._made is not None
        raise self._made

    def close(self) -> None:
        """Ends the thread; what was added is lost."""
        self._given_up = True
        self._chunks.put(None)

    def _run(self) -> None:
        output_format, quality, fps = self._options
        try:
            if output_format == "mp4":
                self._made = MIMES["mp4"], _mp4(self._taken(), self._num_frames, quality, fps)
            elif output_format == "raw":
                self._made = RAW_MIME, b"".join(chunk.tobytes() for chunk in self._taken())
            else:
                self._made = encode_frames(np.concatenate(list(self._taken())), output_format, quality, fps)
        except Exception as error:  # noqa: BLE001 - it is raised by `finish`
            self._made = error
            for _ in self._taken():
                """Whoever adds frames must not wait for ever."""

    def _taken(self) -> Iterator[Frames]:
        while not self._ended:
            chunk = self._chunks.get()
            self._ended = chunk is None
            if chunk is not None and not self._given_up:
                yield chunk


def _mp4(chunks: Iterator[Frames], num_frames: int, quality: int, fps: float) -> bytes:
    import av

    file = io.BytesIO()
    open_container: Callable[..., Any] = av.open
    # The index comes first, so that a player can begin before the end has come; an entry takes less than 64 bytes.
    index_bytes = 4096 + 64 * num_frames
    with open_container(file, "w", format="mp4", options={"moov_size": str(index_bytes)}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(round(40 - 0.3 * quality)), "preset": "veryfast"}
        for index, frames in enumerate(chunks):
            if not index:
                stream.height, stream.width = frames.shape[1], frames.shape[2]
            for pixels in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
