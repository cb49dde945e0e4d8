"""Every failure of the REST front in one shape: OpenAI's error envelope.

`Border` is the outermost layer of the app: it counts request bodies while they are read and turns what nobody
expected into a 500 that shows an id only. The handlers below turn the rest into the envelope.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.request_log import RequestLog
from services.errors import InvalidRequest, NotReady, ServiceError, Unauthenticated

_log = logging.getLogger(__name__)

_HTTP_CODES = {
    404: "unknown_route",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    416: "range_not_satisfiable",
    429: "overloaded",
    503: "not_ready",
}
_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "string_unicode": "a string of valid Unicode",
    "list_type": "a list",
}


class ErrorBody(BaseModel):
    """What went wrong, and what is allowed."""

    message: str
    type: str
    code: str
    param: str | None


class ErrorEnvelope(BaseModel):
    """The answer of every call that fails."""

    error: ErrorBody


def envelope(status: int, message: str, code: str, param: str = "") -> dict[str, Any]:
    """The JSON of an error."""
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": code, "param": param or None}}


def service_envelope(error: ServiceError) -> dict[str, Any]:
    """The JSON of one of our own errors."""
    return envelope(error.http, error.message, error.reason, error.param)


def error_response(error: ServiceError) -> JSONResponse:
    """One of our own errors as an answer, with the headers that go with it."""
    headers = {"Retry-After": str(math.ceil(error.retry_after_s))} if error.retry_after_s > 0 else {}
    if error.request_id:
        headers["x-request-id"] = error.request_id
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(service_envelope(error), error.http, headers)


def install(app: FastAPI, log: RequestLog) -> None:
    """Makes `app` answer every failure with the envelope; bodies that are refused are noted in the log."""

    @app.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = explain(dict(error.errors()[0]))
        if request.method == "POST":
            log.refused(InvalidRequest(message, param=param))
        return JSONResponse(envelope(400, message, "invalid_request", param), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.method} {request.url.path[:200]}: see /docs"
        elif error.status_code == 400:
            # What is no text in UTF-8 fails before anything looks at the JSON.
            message = "the body cannot be read: send a JSON object in UTF-8"
        elif error.status_code == 405:
            message = f"{request.url.path[:200]} does not take {request.method}: see /docs"
        code = _HTTP_CODES.get(error.status_code, "invalid_request")
        return JSONResponse(envelope(error.status_code, message, code), error.status_code, error.headers)


def explain(error: dict[str, Any]) -> tuple[str, str]:
    """One of pydantic's errors as (message, parameter)."""
    kind, context = error["type"], error.get("ctx", {})
    path = [str(part) for part in error["loc"][1:]]
    param = ".".join(path)
    if kind in ("unknown_field", "no_text"):
        return context["message"], ".".join([*path, context["param"]])
    if kind == "json_invalid":
        return f"the body is not valid JSON: {context['error']}", ""
    if not path:
        return "the body must be a JSON object, sent with Content-Type: application/json", ""
    value = _short(error.get("input"))
    if kind == "missing":
        return f"{param} is required", param
    if kind in _EXPECTED:
        return f"{param} must be {_EXPECTED[kind]}, not {value}", param
    if kind == "literal_error":
        return f"{param} is {value}: use {context['expected']}", param
    return f"{param} is {value}: {error['msg'].replace('Input', 'it', 1)}", param


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Border:
    """ASGI layer around the app: a cap on bodies, and no stack trace to anyone outside.

    Args:
        max_body_bytes: of a request's body, counted as it arrives, whatever Content-Length says.
        log: counts the answers.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, log: RequestLog) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._answers = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received = 0
        started = False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, f"the body is too large: at most {self._max_body_bytes} bytes are allowed")
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            if not started:
                started = True
                self._answers.answered(scope["method"], _route(scope), message["status"])
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except asyncio.CancelledError:
            # A server that stops ends the calls that are left: who waits is told so, as of every other error.
            if not started:
                stops = NotReady("the gateway stops: ask again", retry_after_s=1.0)
                await error_response(stops)(scope, receive, watched)
            raise
        except Exception:
            error_id = uuid.uuid4().hex
            _log.exception("internal error %s in %s %s", error_id, scope["method"], scope["path"])
            if started:
                raise
            body = envelope(500, f"internal error {error_id}: the log of the gateway has the details", "internal")
            await JSONResponse(body, 500)(scope, receive, watched)


def _route(scope: Scope) -> str:
    """As the API writes it: ids in paths would make as many counters."""
    return str(getattr(scope.get("route"), "path", ""))
