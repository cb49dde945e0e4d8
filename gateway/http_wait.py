"""Calls that wait for what they ask for: until it is there, it failed, or the client has left."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request

from gateway.access import CallerRequests
from gateway.http_json import error_from
from protos import gateway_pb2
from services.errors import Cancelled, Internal, ServiceError


async def wait_all(requests: CallerRequests, ids: list[str], request: Request) -> list[gateway_pb2.RequestStatus]:
    """The final statuses.

    Raises:
        ServiceError: what one of them failed with.
        Cancelled: the client left.
    """
    waits = asyncio.gather(*(_wait(requests, request_id) for request_id in ids))
    gone = asyncio.create_task(_disconnected(request))
    try:
        watched: set[asyncio.Future[Any]] = {waits, gone}
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        if not waits.done():
            # Before the waits have ended: nothing may stand between a client that leaves and its abort.
            await asyncio.shield(leave_all(requests, ids))
            raise Cancelled("the client left")
        return await waits
    finally:
        gone.cancel()
        waits.cancel()
        await asyncio.gather(gone, waits, return_exceptions=True)


async def leave_all(requests: CallerRequests, ids: list[str]) -> None:
    """Aborts them for a caller that has gone, as soon as Redis answers."""
    await asyncio.gather(*(requests.leave(request_id) for request_id in ids), return_exceptions=True)


def failure(status: gateway_pb2.RequestStatus) -> ServiceError:
    """Why a request that has ended made nothing."""
    if status.HasField("error"):
        return error_from(status.error)
    if status.state == gateway_pb2.REQUEST_STATE_CANCELLED:
        return Cancelled("the request was aborted", request_id=status.request_id)
    return Internal("the request failed", request_id=status.request_id)


async def _wait(requests: CallerRequests, request_id: str) -> gateway_pb2.RequestStatus:
    status = gateway_pb2.RequestStatus()
    async for event in requests.events(request_id):
        if event.WhichOneof("event") == "status":
            status = event.status
    if status.state == gateway_pb2.REQUEST_STATE_DONE:
        return status
    raise failure(status)


async def _disconnected(request: Request) -> None:
    # The body has been read, so nothing else can come.
    while (await request.receive())["type"] != "http.disconnect":
        pass
