"""Pictures and clips from outside: what they are, by their first bytes, and their pixels.

Pixels are decoded in rank processes only; gateways look at headers.
"""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from services.clip_reader import ClipReading, Frames
from services.errors import InvalidRequest
from services.picture_parts import check_parts
from services.request import Limits, Media

PICTURE_ROLES = ("image", "last_image", "mask")
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
    clips = clips_of(inputs)
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
        upright = _eight_bits(image if turn is None else image.transpose(turn))
        return np.asarray(upright.convert("RGBA" if alpha else "RGB"))[None].copy()


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled, which the library would clip to white."""
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode == "I;16" else image


def clips_of(inputs: Sequence[Media]) -> list[Media]:
    """Those of the inputs that are read as clips."""
    return [media for media in inputs if media.role == "video" or (media.role == "mask" and _is_clip(media))]


def decode_inputs(
    inputs: Sequence[Media], max_frames: int = 1, *, alpha: bool = False, clips: Sequence[Frames] | None = None
) -> dict[str, list[Frames]]:
    """The pixels of all inputs by role, each [F, H, W, 3]; of clips the first `max_frames`.

    Pictures have a fourth channel with `alpha`, and as masks.

    Args:
        clips: those of `clips_of(inputs)`, where they have been read already.

    Raises:
        ServiceError: as decode_image and ClipReading.
    """
    films = clips_of(inputs)
    if clips is None:
        clips = ClipReading(films, max_frames).frames() if films else ()
    read = iter(clips)
    decoded: dict[str, list[Frames]] = {}
    for media in inputs:
        frames = next(read) if media in films else decode_image(media, alpha=alpha or media.role == "mask")
        decoded.setdefault(media.role, []).append(frames)
    return decoded


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
    check_parts(media.data)
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
    except UnidentifiedImageError as error:
        raise InvalidRequest(
            f"an input picture cannot be decoded (no known format): send a whole {', '.join(PICTURE_FORMATS)} file",
            param="inputs",
        ) from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise InvalidRequest(
            f"an input picture cannot be decoded ({error}): send a whole {', '.join(PICTURE_FORMATS)} file",
            param="inputs",
        ) from error
