"""Artifacts over HTTP: whole or a range, told apart by their hash. Used by the content route."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from gateway.requests import Content

_RANGE = re.compile(r"bytes=(?P<first>[0-9]{0,19})-(?P<last>[0-9]{0,19})", re.ASCII)
_BINARY = {"schema": {"type": "string", "format": "binary"}}
CONTENT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The whole artifact", "content": {"*/*": _BINARY}},
    206: {"description": "The range that was asked for", "content": {"*/*": _BINARY}},
    304: {"description": "If-None-Match names it"},
    **{
        status: {"description": what}
        for status, what in (
            (403, "The link's signature is not ours"),
            (410, "The link has expired"),
            (416, "The range begins behind the end"),
            (502, "The stored artifact is corrupt"),
        )
    },
}


async def content_response(content: Content, request: Request) -> Response:
    """The answer to a GET or HEAD of an artifact, with what Range, If-Range and If-None-Match of the request mean.

    Raises:
        HTTPException: 416.
        ServiceError: as Store.read, as long as nothing was sent. Later the connection breaks off.
    """
    artifact = content.artifact
    etag = f'"{artifact.sha256}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "X-Content-Type-Options": "nosniff",
        # Its content never changes, but who may see it can.
        "Cache-Control": "private, no-cache",
    }
    known = request.headers.get("if-none-match", "")
    if known == "*" or etag in known:
        return Response(status_code=304, headers=headers)
    wanted = request.headers.get("range", "") if request.headers.get("if-range", etag) == etag else ""
    part = byte_range(wanted, artifact.nbytes)
    start, stop = part or (0, artifact.nbytes)
    headers["Content-Length"] = str(stop - start)
    if part:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{artifact.nbytes}"
    status = 206 if part else 200
    pieces = content.read(start, stop)
    # What is wrong must be known before the status goes out, for HEAD as for GET.
    first = await anext(pieces, b"")
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=artifact.mime)
    return StreamingResponse(_chained(first, pieces), status, headers, artifact.mime)


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


def byte_range(header: str, nbytes: int) -> tuple[int, int] | None:
    """Start and stop of a Range header; None when there is none to follow: none, several, or not in bytes (RFC 9110).

    Raises:
        HTTPException: 416, it begins behind the end.
    """
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match["first"], match["last"]
    if first and last and int(last) < int(first):
        return None
    if not first:
        start, stop = max(0, nbytes - int(last)), nbytes
    else:
        start, stop = int(first), min(int(last) + 1, nbytes) if last else nbytes
    if start >= nbytes:
        message = f"the range begins behind the end: the artifact has {nbytes} bytes"
        raise HTTPException(416, message, {"Content-Range": f"bytes */{nbytes}"})
    return start, stop
