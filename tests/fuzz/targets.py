"""What is fuzzed: functions of bytes from outside. Each may refuse its input with a ServiceError, and nothing else."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable

from services.errors import CorruptTensor, ServiceError
from services.media import decode_image, image_size
from services.request import Media
from services.tensor_wire import frame_of
from services.tensors import BundleReader

MAX_BUNDLE_BYTES = 1 << 20
MAX_PIXELS = 1 << 20


def tensor_frames(data: bytes) -> None:
    """A stream of messages, each behind its length (u16, little endian): the tensor codec takes it or refuses it."""
    reader, position = BundleReader(MAX_BUNDLE_BYTES), 0
    with contextlib.suppress(CorruptTensor):
        while position + 2 <= len(data):
            (length,) = struct.unpack_from("<H", data, position)
            message = data[position + 2 : position + 2 + length]
            position += 2 + length
            frame = frame_of(message)
            if frame is None:
                continue
            bundle = reader.feed(frame)
            if bundle is not None:
                assert sum(tensor.nbytes for tensor in bundle.tensors.values()) <= MAX_BUNDLE_BYTES
                assert reader.empty


def picture(data: bytes) -> None:
    """A picture: its header as the gateway reads it, then its pixels as a rank does. Both agree on the size."""
    media = Media("image/png", data, "image")
    with contextlib.suppress(ServiceError):
        width, height = image_size(media)
        if width * height <= MAX_PIXELS:
            assert decode_image(media).shape == (1, height, width, 3)


TARGETS: dict[str, Callable[[bytes], None]] = {"tensor_frames": tensor_frames, "picture": picture}
