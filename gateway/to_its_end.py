"""Waiting for work that must not be left half done."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def to_its_end(work: Awaitable[T]) -> T:
    """The work's result. Who is cancelled meanwhile waits all the same, however often: an abort, a lost lease and the
    end of the gateway may each cancel a request in work.

    Raises:
        CancelledError: the caller was cancelled; the work has ended.
        Exception: what the work raised.
    """
    future = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            # Unlike a gather or a shield, it leaves the work alone when it is cancelled, and can be called again.
            await asyncio.wait({future})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not future.cancelled():
            # Seen: nobody else asks for it.
            future.exception()
        raise cancelled
    return future.result()
