"""The REST front: OpenAI's images API, requests with events, models, health, metrics, and a page to try it."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gateway.access import CallerRequests, Door
from gateway.backlog import Backlog
from gateway.config import GatewaySection
from gateway.http_access import KeyCheck, Requests, requests_of
from gateway.http_bodies import BodyCredits
from gateway.http_content import CONTENT_ANSWERS, content_response
from gateway.http_errors import Border, ErrorEnvelope, install, service_envelope
from gateway.http_json import (
    error_from,
    event_json,
    model_json,
    params_json,
    span_json,
    state_name,
    status_json,
)
from gateway.http_schema import GenerationRequest, ImageRequest
from gateway.links import content_path
from gateway.requests import MAX_LIST, RequestService
from protos import gateway_pb2
from services.errors import Cancelled, Internal, ServiceError
from services.request import GenerationParams, with_seed

PAGE = Path(__file__).parent / "page.html"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope} for status in (400, 401, 403, 404, 409, 429, 503)
}


EVENTS = "text/event-stream"


def _answers(*mimes: str) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI page: what a good answer may hold."""
    return {200: {"content": {mime: {} for mime in mimes}}}


def create_app(door: Door, backlog: Backlog, config: GatewaySection) -> FastAPI:
    """The whole REST API behind a door; `backlog` is for the metrics page."""
    app = FastAPI(title="Lightloom", version="1", docs_url=None, redoc_url=None, responses=ERRORS)
    install(app)
    app.add_middleware(KeyCheck, door=door)
    # Text, JSON and picture: a body that is parsed takes several times its bytes.
    app.add_middleware(BodyCredits, max_bytes=config.max_held_bytes // 4)
    app.add_middleware(Border, max_body_bytes=config.max_body_bytes)
    _add_images(app)
    _add_requests(app, door.service)
    _add_operations(app, door.service, backlog)
    return app


def _add_images(app: FastAPI) -> None:
    @app.post("/v1/images/generations", response_model=None, responses=_answers("application/json", EVENTS))
    async def generate_images(body: ImageRequest, request: Request, requests: Requests) -> Response:
        """Makes images and waits for them (OpenAI's call). Leaving aborts."""
        fetched = await requests.fetch(body.remote())
        params = body.params(requests.model_of(body.model or ""), fetched=fetched)
        traceparent = request.headers.get("traceparent", "")
        if body.stream:
            # Steps are not known before the model's default is: previews come at even shares of the default.
            every = _preview_every(requests, params, body.partial_images or 0)
            request_id = await requests.submit(replace(params, preview_every=every), traceparent=traceparent)
            return _sse(_stream_image(requests, request_id, body.partial_images or 0))
        count = body.n or 1
        ids = []
        try:
            for index in range(count):
                seeded = params if params.seed is None else with_seed(params, params.seed + index)
                ids.append(await requests.submit(seeded, traceparent=traceparent))
            statuses = await _wait_all(requests, ids, request)
        except BaseException:
            await asyncio.shield(_abort_all(requests, ids))
            raise
        images = [await _image_json(requests, status, body.response_format or "b64_json") for status in statuses]
        return JSONResponse({"created": int(time.time()), "data": images, "output_format": body.file_format()})


def _add_requests(app: FastAPI, service: RequestService) -> None:
    @app.post("/v1/requests", status_code=202)
    async def create_request(body: GenerationRequest, request: Request, requests: Requests) -> dict[str, Any]:
        """Submits any generation and returns at once."""
        fetched = await requests.fetch(body.remote())
        request_id = await requests.submit(
            body.params(requests.model_of(body.model or ""), fetched),
            idempotency_key=request.headers.get("idempotency-key", ""),
            priority=body.priority,
            traceparent=request.headers.get("traceparent", ""),
        )
        return status_json(await requests.get(request_id))

    @app.get("/v1/requests")
    async def list_requests(
        requests: Requests, limit: Annotated[int, Query(ge=1, le=MAX_LIST)] = 100
    ) -> dict[str, Any]:
        """The newest requests: of the key's tenant, or of all with `read_all`."""
        return {"object": "list", "data": [status_json(status) for status in await requests.newest(limit)]}

    @app.get("/v1/requests/{request_id}")
    async def get_request(request_id: str, requests: Requests) -> dict[str, Any]:
        """State, progress, parameters, result or error."""
        return status_json(await requests.get(request_id))

    @app.delete("/v1/requests/{request_id}")
    async def abort_request(request_id: str, requests: Requests) -> dict[str, Any]:
        """Aborts; a request that has ended stays as it is."""
        return {"id": request_id, "object": "request", "state": state_name(await requests.abort(request_id))}

    @app.get(
        "/v1/requests/{request_id}/events",
        response_model=None,
        response_class=StreamingResponse,
        responses=_answers(EVENTS),
    )
    async def request_events(request_id: str, request: Request, requests: Requests) -> Response:
        """Server-sent events, resumable by Last-Event-ID through any gateway."""
        events = requests.events(request_id, request.headers.get("last-event-id", ""))
        # The answer's status goes out before the first event: what is wrong must be known now.
        await requests.get(request_id)
        return _sse(_events(events))

    @app.head("/v1/requests/{request_id}/content", include_in_schema=False)
    @app.get("/v1/requests/{request_id}/content", response_model=None, responses=CONTENT_ANSWERS)
    async def request_content(request_id: str, request: Request) -> Response:
        """What the request made. Needs no access key with a signed link, which `artifact.url` of a request is."""
        # KeyCheck lets calls without a key come here.
        if await service.links.is_signed(content_path(request_id), request.query_params):
            found = await service.content(request_id)
        else:
            found = await requests_of(request, None).content(request_id)
        return await content_response(found, request)

    @app.get("/v1/requests/{request_id}/trace")
    async def request_trace(request_id: str, requests: Requests) -> dict[str, Any]:
        """The request's timeline over all processes."""
        return {"id": request_id, "spans": [span_json(span) for span in await requests.trace(request_id)]}


def _add_operations(app: FastAPI, service: RequestService, backlog: Backlog) -> None:
    @app.get("/v1/models")
    async def list_models(requests: Requests) -> dict[str, Any]:
        """Models with limits and replicas."""
        return {"object": "list", "data": [model_json(model) for model in requests.models()]}

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while Redis answers and a model has all its stages, else 503."""
        now = await service.health()
        return JSONResponse({"redis": now.redis, "models": now.models}, 200 if now.ready else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest() + await backlog.exposition(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_docs(app.openapi()))


async def _wait_all(requests: CallerRequests, ids: list[str], request: Request) -> list[gateway_pb2.RequestStatus]:
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
            await asyncio.shield(_abort_all(requests, ids))
            raise Cancelled("the client left")
        return await waits
    finally:
        gone.cancel()
        waits.cancel()
        await asyncio.gather(gone, waits, return_exceptions=True)


async def _wait(requests: CallerRequests, request_id: str) -> gateway_pb2.RequestStatus:
    status = gateway_pb2.RequestStatus()
    async for event in requests.events(request_id):
        if event.WhichOneof("event") == "status":
            status = event.status
    return _finished(status)


def _finished(status: gateway_pb2.RequestStatus) -> gateway_pb2.RequestStatus:
    if status.state == gateway_pb2.REQUEST_STATE_DONE:
        return status
    raise _failure(status)


def _failure(status: gateway_pb2.RequestStatus) -> ServiceError:
    if status.HasField("error"):
        return error_from(status.error)
    if status.state == gateway_pb2.REQUEST_STATE_CANCELLED:
        return Cancelled("the request was aborted", request_id=status.request_id)
    return Internal("the request failed", request_id=status.request_id)


async def _disconnected(request: Request) -> None:
    # The body has been read, so nothing else can come.
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _abort_all(requests: CallerRequests, ids: list[str]) -> None:
    await asyncio.gather(*(requests.abort(request_id) for request_id in ids), return_exceptions=True)


async def _image_json(requests: CallerRequests, status: gateway_pb2.RequestStatus, form: str) -> dict[str, Any]:
    if form == "url":
        return {"url": status.artifact.url, "request_id": status.request_id}
    data = b"".join([piece async for piece in requests.media(status)])
    return {"b64_json": base64.b64encode(data).decode(), "request_id": status.request_id}


def _preview_every(requests: CallerRequests, params: GenerationParams, partial_images: int) -> int:
    if not partial_images:
        return 0
    [info] = [model for model in requests.models() if model.name == params.model] or [gateway_pb2.ModelInfo()]
    steps = params.steps or info.limits.default_steps or 20
    return max(1, steps // (partial_images + 1))


async def _stream_image(requests: CallerRequests, request_id: str, partial_images: int) -> AsyncIterator[str]:
    """OpenAI's stream: partial images, then the completed one. Leaving aborts."""
    sent, ended = 0, False
    try:
        async for event in requests.events(request_id):
            kind = event.WhichOneof("event")
            if kind == "preview" and sent < partial_images:
                data = {"b64_json": base64.b64encode(event.preview.data).decode(), "partial_image_index": sent}
                sent += 1
                yield _line("image_generation.partial_image", _common(data, "jpeg", "auto"))
            elif kind == "status" and event.status.state == gateway_pb2.REQUEST_STATE_DONE:
                image = await _image_json(requests, event.status, "b64_json")
                params = params_json(event.status.params)
                size = f"{event.status.artifact.width}x{event.status.artifact.height}"
                usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
                common = _common(image | {"usage": usage}, params.get("output_format", "png"), size)
                ended = True
                yield _line("image_generation.completed", common)
            elif kind == "status" and event.status.state >= gateway_pb2.REQUEST_STATE_FAILED:
                ended = True
                yield _line("error", service_envelope(_failure(event.status)))
    except ServiceError as error:
        yield _line("error", service_envelope(error))
    finally:
        if not ended:
            await asyncio.shield(_abort_all(requests, [request_id]))


def _common(data: dict[str, Any], output_format: str, size: str) -> dict[str, Any]:
    return data | {
        "created_at": int(time.time()),
        "background": "opaque",
        "output_format": output_format,
        "quality": "auto",
        "size": size,
    }


async def _events(events: AsyncIterator[gateway_pb2.GenerateResponse]) -> AsyncIterator[str]:
    try:
        async for event in events:
            name, data = event_json(event)
            yield f"id: {event.event_id}\nevent: {name}\ndata: {json.dumps(data)}\n\n"
    except ServiceError as error:
        yield _line("error", service_envelope(error))


def _line(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | data)}\n\n"


def _sse(lines: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _docs(schema: dict[str, Any]) -> str:
    rows = [
        f"<tr><td><code>{method.upper()} {path}</code></td><td>{spec.get('description', '')}</td></tr>"
        for path, methods in schema["paths"].items()
        for method, spec in methods.items()
    ]
    return (
        "<!doctype html><meta charset=utf-8><title>Lightloom REST API</title>"
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto}td{padding:.3em 1em}</style>"
        f"<h1>REST API</h1><p>Schemas: <a href=/openapi.json>openapi.json</a></p><table>{''.join(rows)}</table>"
    )
