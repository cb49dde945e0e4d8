"""The REST front, and its routes of OpenAI's images API."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from gateway.access import CallerRequests, Door
from gateway.backlog import Backlog
from gateway.config import GatewaySection
from gateway.http_access import KeyCheck, Requests
from gateway.http_bodies import BodyCredits
from gateway.http_errors import Border, ErrorEnvelope, install, service_envelope
from gateway.http_form import EDIT, form_description, read_form
from gateway.http_json import params_json
from gateway.http_operations import add_operations
from gateway.http_requests import add_requests
from gateway.http_schema import ImageRequest
from gateway.http_sse import EVENTS, REQUEST_ID, event_stream, typed_event
from gateway.http_videos import add_videos
from gateway.http_wait import failure, leave_all, wait_all
from protos import gateway_pb2
from services.errors import ServiceError
from services.request import GenerationParams, Media, with_seed

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope} for status in (400, 401, 403, 404, 409, 429, 503)
}
# Clients want to have one; nothing is counted in tokens here.
_NONE = {"image_tokens": 0, "text_tokens": 0}
USAGE = {"input_tokens": 0, "input_tokens_details": _NONE, "output_tokens": 0, "total_tokens": 0}


def _answers(*mimes: str) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI page: what a good answer may hold."""
    return {200: {"content": {mime: {} for mime in mimes}}}


def create_app(door: Door, backlog: Backlog, config: GatewaySection) -> FastAPI:
    """The whole REST API behind a door; `backlog` is for the metrics page."""
    app = FastAPI(title="Lightloom", version="1", docs_url=None, redoc_url=None, responses=ERRORS)
    install(app, door.log)
    app.add_middleware(KeyCheck, door=door)
    # Text, JSON and picture: a body that is parsed takes several times its bytes.
    app.add_middleware(BodyCredits, max_bytes=config.max_held_bytes // 4, timeout_s=config.body_timeout_s)
    app.add_middleware(Border, max_body_bytes=config.max_body_bytes, log=door.log)
    _add_images(app, config.public_url.rstrip("/"))
    add_videos(app)
    add_requests(app, door.service)
    add_operations(app, door.service, backlog)
    return app


def _add_images(app: FastAPI, public_url: str) -> None:
    answers = _answers("application/json", EVENTS)

    @app.post("/v1/images/generations", response_model=None, responses=answers)
    async def generate_images(body: ImageRequest, request: Request, requests: Requests) -> Response:
        """Makes images and waits for them (OpenAI's call). Leaving aborts."""
        return await _make(body, (), request, requests, public_url)

    @app.post("/v1/images/edits", response_model=None, responses=answers, openapi_extra=form_description(EDIT))
    async def edit_images(request: Request, requests: Requests) -> Response:
        """Makes images out of the pictures in the form, and waits for them (OpenAI's call). Leaving aborts."""
        body, pictures = await read_form(request, EDIT)
        return await _make(body, pictures, request, requests, public_url)


async def _make(
    body: ImageRequest, pictures: tuple[Media, ...], request: Request, requests: CallerRequests, public_url: str
) -> Response:
    with requests.refusals(body.model or ""):
        fetched = await requests.fetch(body.remote())
        params = body.params(requests.model(requests.model_of(body.model or "")), pictures, fetched)
        if body.stream:
            # Steps are not known before the model's default is: previews come at even shares of the default.
            params = replace(params, preview_every=_preview_every(requests, params, body.partial_images or 0))
    traceparent = request.headers.get("traceparent", "")
    ids: list[str] = []
    try:
        with requests.refusals(body.model or ""):
            for index in range(body.n or 1):
                seeded = params if params.seed is None else with_seed(params, params.seed + index)
                ids.append(await requests.submit(seeded, traceparent=traceparent))
        if body.stream:
            kind = "image_edit" if pictures else "image_generation"
            return event_stream(_stream_image(requests, ids[0], kind, body.partial_images or 0), ids[0])
        statuses = await wait_all(requests, ids, request)
    except BaseException:
        await asyncio.shield(leave_all(requests, ids))
        raise
    # What the call itself says stands in Host, and, from a proxy on this machine, in X-Forwarded-Proto.
    base = public_url or str(request.base_url).rstrip("/")
    images = [await _image_json(requests, status, base if body.response_format == "url" else "") for status in statuses]
    answer = {"created": int(time.time()), "data": images, "output_format": body.file_format(), "usage": USAGE}
    return JSONResponse(answer, headers={REQUEST_ID: ids[0]})


async def _image_json(
    requests: CallerRequests, status: gateway_pb2.RequestStatus, link_base: str = ""
) -> dict[str, Any]:
    """One image: its data, or a link to it that begins with `link_base`."""
    if link_base:
        return {"url": link_base + status.artifact.url, "request_id": status.request_id}
    data = b"".join([piece async for piece in requests.media(status)])
    return {"b64_json": base64.b64encode(data).decode(), "request_id": status.request_id}


def _preview_every(requests: CallerRequests, params: GenerationParams, partial_images: int) -> int:
    if not partial_images:
        return 0
    steps = params.steps or requests.model(params.model).limits.default_steps or 20
    return max(1, steps // (partial_images + 1))


async def _stream_image(
    requests: CallerRequests, request_id: str, name: str, partial_images: int
) -> AsyncGenerator[str]:
    """OpenAI's stream: partial images, then the completed one. Leaving aborts."""
    sent, ended = 0, False
    try:
        async for event in requests.events(request_id):
            kind = event.WhichOneof("event")
            if kind == "preview" and sent < partial_images:
                data = {"b64_json": base64.b64encode(event.preview.data).decode(), "partial_image_index": sent}
                sent += 1
                yield typed_event(f"{name}.partial_image", _common(data, "jpeg", "auto"))
            elif kind == "status" and event.status.state == gateway_pb2.REQUEST_STATE_DONE:
                image = await _image_json(requests, event.status)
                params = params_json(event.status.params)
                size = f"{event.status.artifact.width}x{event.status.artifact.height}"
                common = _common(image | {"usage": USAGE}, params.get("output_format", "png"), size)
                ended = True
                yield typed_event(f"{name}.completed", common)
            elif kind == "status" and event.status.state >= gateway_pb2.REQUEST_STATE_FAILED:
                ended = True
                yield typed_event("error", service_envelope(failure(event.status)))
    except ServiceError as error:
        yield typed_event("error", service_envelope(error))
    finally:
        if not ended:
            await asyncio.shield(leave_all(requests, [request_id]))


def _common(data: dict[str, Any], output_format: str, size: str) -> dict[str, Any]:
    return data | {
        "created_at": int(time.time()),
        "background": "opaque",
        "output_format": output_format,
        "quality": "auto",
        "size": size,
    }
