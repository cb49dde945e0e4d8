"""The REST routes of requests: submit, follow, abort, list, and what they made."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import StreamingResponse

from gateway.http_access import Requests, requests_of
from gateway.http_content import CONTENT_ANSWERS, content_response
from gateway.http_errors import service_envelope
from gateway.http_json import event_json, span_json, state_name, status_json
from gateway.http_schema import GenerationRequest
from gateway.http_sse import EVENTS, REQUEST_ID, event_stream, event_text, typed_event
from gateway.links import content_path
from gateway.requests import MAX_LIST, RequestService
from protos import gateway_pb2
from services.errors import ServiceError


def add_requests(app: FastAPI, service: RequestService) -> None:
    """Adds the routes; `service` opens signed links, which need no key."""

    @app.post("/v1/requests", status_code=202)
    async def create_request(
        body: GenerationRequest, request: Request, response: Response, requests: Requests
    ) -> dict[str, Any]:
        """Submits any generation and returns at once."""
        with requests.refusals(body.model or ""):
            fetched = await requests.fetch(body.remote())
            request_id = await requests.submit(
                body.params(requests.model_of(body.model or ""), fetched),
                idempotency_key=request.headers.get("idempotency-key", ""),
                priority=body.priority,
                traceparent=request.headers.get("traceparent", ""),
            )
        response.headers[REQUEST_ID] = request_id
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

    @app.get("/v1/requests/{request_id}/trace")
    async def request_trace(request_id: str, requests: Requests) -> dict[str, Any]:
        """The request's timeline over all processes."""
        return {"id": request_id, "spans": [span_json(span) for span in await requests.trace(request_id)]}

    _add_outputs(app, service)


def _add_outputs(app: FastAPI, service: RequestService) -> None:
    """What a request says while it runs, and what it made."""

    @app.get(
        "/v1/requests/{request_id}/events",
        response_model=None,
        response_class=StreamingResponse,
        responses={200: {"content": {EVENTS: {}}}},
    )
    async def request_events(request_id: str, request: Request, requests: Requests) -> Response:
        """Server-sent events, resumable by Last-Event-ID through any gateway."""
        events = requests.events(request_id, request.headers.get("last-event-id", ""))
        # The answer's status goes out before the first event: what is wrong must be known now.
        await requests.get(request_id)
        return event_stream(_events(events), request_id)

    @app.head("/v1/requests/{request_id}/content", include_in_schema=False)
    @app.get("/v1/requests/{request_id}/content", response_model=None, responses=CONTENT_ANSWERS)
    async def request_content(request_id: str, request: Request) -> Response:
        """What the request made. Needs no access key with a signed link, which `artifact.url` of a request is."""
        # KeyCheck lets calls without a key come here.
        if await service.links.is_signed(content_path(request_id), request.query_params):
            found = await service.content(request_id)
        else:
            found = await (await requests_of(request, None)).content(request_id)
        return await content_response(found, request)


async def _events(events: AsyncIterator[gateway_pb2.GenerateResponse]) -> AsyncGenerator[str]:
    try:
        async for event in events:
            name, data = event_json(event)
            yield event_text(name, data, event.event_id)
    except ServiceError as error:
        yield typed_event("error", service_envelope(error))
