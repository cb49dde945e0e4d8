"""OpenAI's videos API: make a clip, ask how far it is, fetch it, list clips, abort one."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response

from gateway.access import CallerRequests
from gateway.http_access import Requests
from gateway.http_content import CONTENT_ANSWERS, content_response
from gateway.http_form import Form, form_description, read_body
from gateway.http_sse import REQUEST_ID
from gateway.http_video_schema import VideoRequest, is_video, video_json
from gateway.http_wait import leave_all, wait_all
from gateway.requests import MAX_LIST, MAX_LIST_BYTES
from protos import gateway_pb2
from services.errors import InvalidRequest, UnknownRequest

VIDEO = Form(VideoRequest, "input_reference", "The pictures to begin with.", required=False)
DEFAULT_LIST = 20
# Requests that are looked at for one page: pictures may be many, and clips few.
MAX_READ = 2000


def add_videos(app: FastAPI) -> None:
    """Adds the routes."""

    @app.post("/v1/videos", openapi_extra=form_description(VIDEO))
    async def create_video(request: Request, response: Response, requests: Requests) -> dict[str, Any]:
        """Begins a clip and returns at once."""
        request_id = await _submit(request, requests)
        response.headers[REQUEST_ID] = request_id
        return video_json(await requests.get(request_id))

    @app.post("/v1/videos/sync", response_model=None, responses=CONTENT_ANSWERS, openapi_extra=form_description(VIDEO))
    async def make_video(request: Request, requests: Requests) -> Response:
        """Makes a clip and answers with the file. Leaving aborts."""
        request_id = await _submit(request, requests)
        try:
            await wait_all(requests, [request_id], request)
        except BaseException:
            await asyncio.shield(leave_all(requests, [request_id]))
            raise
        answer = await content_response(await requests.content(request_id), request)
        answer.headers[REQUEST_ID] = request_id
        return answer

    @app.get("/v1/videos")
    async def list_videos(
        requests: Requests,
        limit: Annotated[int, Query(ge=1, le=MAX_LIST)] = DEFAULT_LIST,
        order: Literal["asc", "desc"] = "desc",
        after: str = "",
    ) -> dict[str, Any]:
        """Clips, `limit` of them or as many as an answer takes; `after` is the `last_id` of the page before.

        While it `has_more` a page may have fewer clips, or none: other requests lay between them.
        """
        data, more, last_id = await _page(requests, limit, after, oldest_first=order == "asc")
        return {
            "object": "list",
            "data": data,
            "has_more": more,
            "first_id": data[0]["id"] if data else None,
            "last_id": last_id,
        }

    @app.get("/v1/videos/{video_id}")
    async def get_video(video_id: str, requests: Requests) -> dict[str, Any]:
        """State and progress."""
        return video_json(await _video(requests, video_id))

    @app.delete("/v1/videos/{video_id}")
    async def delete_video(video_id: str, requests: Requests) -> dict[str, Any]:
        """Aborts; `deleted` is false for a clip that was done before, which stays."""
        await _video(requests, video_id)
        state = await requests.abort(video_id)
        deleted = state != gateway_pb2.REQUEST_STATE_DONE
        return {"id": video_id, "object": "video.deleted", "deleted": deleted}

    @app.head("/v1/videos/{video_id}/content", include_in_schema=False)
    @app.get("/v1/videos/{video_id}/content", response_model=None, responses=CONTENT_ANSWERS)
    async def video_content(video_id: str, request: Request, requests: Requests, variant: str = "video") -> Response:
        """The file, whole or a range of it."""
        if variant != "video":
            raise InvalidRequest(f"variant is {variant[:40]!r}: there is the video alone", param="variant")
        await _video(requests, video_id)
        return await content_response(await requests.content(video_id), request)


async def _submit(request: Request, requests: CallerRequests) -> str:
    body, pictures = await read_body(request, VIDEO)
    with requests.refusals(body.model or ""):
        fetched = await requests.fetch(body.remote())
        params = body.params(requests.model(requests.model_of(body.model or "")), pictures, fetched)
        return await requests.submit(
            params,
            idempotency_key=request.headers.get("idempotency-key", ""),
            traceparent=request.headers.get("traceparent", ""),
        )


async def _video(requests: CallerRequests, video_id: str) -> gateway_pb2.RequestStatus:
    """Raises UnknownRequest: there is no such request, or it asks for no clip."""
    status = await requests.get(video_id)
    if not is_video(status):
        raise UnknownRequest(f"request {video_id[:100]} makes no video", request_id=video_id)
    return status


async def _page(
    requests: CallerRequests, limit: int, after: str, *, oldest_first: bool
) -> tuple[list[dict[str, Any]], bool, str | None]:
    """Clips of a list, whether there may be more, and after which id these begin.

    Raises:
        UnknownRequest: the caller has no request `after`, or no longer.
    """
    found: list[dict[str, Any]] = []
    read, left_bytes = 0, MAX_LIST_BYTES
    try:
        async for request_id, status in requests.walk(after=after, oldest_first=oldest_first):
            if status is not None and is_video(status):
                left_bytes -= status.ByteSize()
                if len(found) == limit or (found and left_bytes < 0):
                    return found, True, found[-1]["id"]
                found.append(video_json(status))
            read += 1
            if read == MAX_READ:
                return found, True, request_id
    except UnknownRequest:
        raise UnknownRequest(f"after: there is no request {after[:100]!r}", param="after") from None
    return found, False, found[-1]["id"] if found else None
