"""How many bytes of request bodies the REST front holds at once: each may be as large as a picture."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.errors import Overloaded

RETRY_AFTER_S = 1.0


class BodyCredits:
    """ASGI layer inside `Border`: a body is counted as it arrives, until its call has been answered.

    The app gets one body in each turn of the event loop: parsing takes a millisecond or more, and a crowd of bodies
    would keep quick calls, aborts above all, from their turn.

    Args:
        max_bytes: of all calls together; who would exceed it is refused with 429. One body alone may.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._held = 0
        self._parsing = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        own = 0

        async def counted() -> Message:
            nonlocal own
            message = await receive()
            nbytes = len(message.get("body", b""))
            if self._held > own and self._held + nbytes > self._max_bytes:
                raise Overloaded("too many large requests arrive at once: try again", retry_after_s=RETRY_AFTER_S)
            own += nbytes
            self._held += nbytes
            if message["type"] == "http.request" and own and not message.get("more_body"):
                async with self._parsing:
                    await asyncio.sleep(0)
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._held -= own
