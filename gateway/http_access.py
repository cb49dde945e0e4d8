"""The REST front's door: every call under /v1 brings its key, and is refused before its body is read.

What stays open: /health (probes have no key), /metrics (totals of the process without names, prompts or ids, which
Prometheus reads from inside; an ingress need not pass it on), the page and the descriptions of the API.
"""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.access import HOW, CallerRequests, Door
from gateway.http_errors import error_response
from services.errors import Unauthenticated

_CONTENT = re.compile(r"/v1/requests/[^/]+/content")
# Never raises by itself: it tells the OpenAPI description that a key is taken.
_bearer = HTTPBearer(auto_error=False, description="An API key made by `lightloom key create`.")


class KeyCheck:
    """ASGI layer: opens the door for calls under /v1.

    The content of a request may also be opened by a signed link, so a call to it passes without a key; its handler asks
    for the requests (`requests_of`), which are there only for a caller with one.
    """

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            authorization = HTTPConnection(scope).headers.get("authorization", "")
            try:
                scope.setdefault("state", {})["requests"] = self._door.open(authorization)
            except Unauthenticated as error:
                if authorization or not _CONTENT.fullmatch(scope["path"]):
                    await error_response(error)(scope, receive, send)
                    return
        await self._app(scope, receive, send)


async def requests_of(
    request: Request, _key: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> CallerRequests:
    """The requests as the caller may use them. A coroutine: others would each wait for a thread.

    Raises:
        Unauthenticated: the call came without a key.
    """
    requests: CallerRequests | None = getattr(request.state, "requests", None)
    if requests is None:
        raise Unauthenticated(f"an API key or a signed link is needed: {HOW}")
    return requests


Requests = Annotated[CallerRequests, Depends(requests_of)]
