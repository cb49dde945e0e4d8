"""The REST routes beside requests: models, health, metrics, the page to try it, and the description of the API."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gateway.backlog import Backlog
from gateway.http_access import Requests
from gateway.http_docs import docs_page
from gateway.http_json import model_json
from gateway.requests import RequestService

PAGE = Path(__file__).parent / "page.html"


def add_operations(app: FastAPI, service: RequestService, backlog: Backlog) -> None:
    """Adds the routes; `backlog` is for the metrics page."""

    @app.get("/v1/models")
    async def list_models(requests: Requests) -> dict[str, Any]:
        """Models with limits and replicas."""
        return {"object": "list", "data": [model_json(model) for model in requests.models()]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str, requests: Requests) -> dict[str, Any]:
        """One model with its limits and replicas."""
        return model_json(requests.model(name))

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while Redis takes writes and a model has all its stages, else 503."""
        now = await service.health()
        return JSONResponse(asdict(now), 200 if now.ready else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest() + await backlog.exposition(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))
