"""Pictures that clients send: out of data URLs and form fields, checked by size and magic number.

Used by the REST bodies. Pixels are never decoded here: that happens in rank processes only.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import replace

from services.errors import InvalidRequest
from services.media import INPUT_MIMES, media_type
from services.request import Media

_SAME = {
    ("image/jpg", "image/jpeg"),
    ("audio/x-wav", "audio/wav"),
    ("audio/wave", "audio/wav"),
    ("audio/x-flac", "audio/flac"),
}
# The kind of file that a role is for; others may be of several.
_KINDS = {"image": "image/", "last_image": "image/", "video": "video/"}
_DATA_URL = re.compile(r"data:([a-z]+/[a-z0-9.+-]+);base64,", re.IGNORECASE)


def is_remote(url: str) -> bool:
    """Whether a URL names a picture elsewhere, which has to be fetched."""
    return url[:8].lower().startswith(("http://", "https://"))


def media_of_url(url: str, param: str, role: str = "image", fetched: Mapping[str, Media] | None = None) -> Media:
    """Decodes `data:MIME;base64,DATA`, or takes what was fetched for the URL.

    Raises:
        InvalidRequest: another kind of URL, bad base64, or as `media_of_bytes`.
    """
    if fetched and url in fetched:
        return replace(fetched[url], role=role)
    match = _DATA_URL.match(url)
    if not match:
        raise InvalidRequest(
            f"{param} starts with {url[:24]!r}: send the picture itself, as data:image/png;base64,...", param=param
        )
    try:
        data = base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"{param} is not valid base64: {error}", param=param) from error
    return media_of_bytes(data, match[1].lower(), param, role)


def media_of_bytes(data: bytes, mime: str, param: str, role: str = "image") -> Media:
    """The bytes as an input of a generation; the true type is read from their first bytes.

    Args:
        mime: what the client says it is. It must be true; "" and application/octet-stream say nothing.

    Raises:
        InvalidRequest: empty, of an unknown type, or not what the client said.
    """
    if not data:
        raise InvalidRequest(f"{param} is empty", param=param)
    actual = media_type(data)
    if actual is None:
        raise InvalidRequest(f"{param} is of no known type: send {', '.join(_formats(role))}", param=param)
    if mime not in ("", "application/octet-stream", actual) and (mime, actual) not in _SAME:
        raise InvalidRequest(f"{param} says it is {mime}, but its bytes are {actual}", param=param)
    return Media(mime=actual, data=data, role=role)


def _formats(role: str) -> list[str]:
    return [name for name, mime in INPUT_MIMES.items() if mime.startswith(_KINDS.get(role, ""))]
