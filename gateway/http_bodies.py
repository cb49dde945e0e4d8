"""How the REST front reads request bodies: each in a given time, all together within a given number of bytes."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

RETRY_AFTER_S = 1


class BodyCredits:
    """ASGI layer inside `Border`: a body is counted as it arrives, until its call has been answered.

    The app gets one body in each turn of the event loop: parsing takes a millisecond or more, and a crowd of bodies
    would keep quick calls, aborts above all, from their turn.

    Args:
        max_bytes: of all calls together; who would exceed it is refused with 429. One body alone may.
        timeout_s: from the first look at a body to its end; who takes longer is refused with 408.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._held = 0
        self._parsing = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        own, end_s, whole = 0, 0.0, False

        async def counted() -> Message:
            nonlocal own, end_s, whole
            if whole:
                # What comes now is the end of the connection.
                return await receive()
            end_s = end_s or asyncio.get_running_loop().time() + self._timeout_s
            message = await self._in_time(receive, end_s)
            nbytes = len(message.get("body", b""))
            if self._held > own and self._held + nbytes > self._max_bytes:
                # A ServiceError would pass for a fault in the body, and be answered with 400.
                text = "too many large requests arrive at once: try again"
                raise HTTPException(429, text, {"Retry-After": str(RETRY_AFTER_S)})
            own += nbytes
            self._held += nbytes
            whole = not message.get("more_body", False)
            if message["type"] == "http.request" and own and whole:
                async with self._parsing:
                    await asyncio.sleep(0)
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._held -= own

    async def _in_time(self, receive: Receive, end_s: float) -> Message:
        try:
            async with asyncio.timeout_at(end_s):
                return await receive()
        except TimeoutError:
            text = f"the body did not arrive within {self._timeout_s:g} s: send it faster, or a smaller one"
            # The rest must not be waited for either.
            raise HTTPException(408, text, {"Connection": "close"}) from None
