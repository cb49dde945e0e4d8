"""Clients that wait for their pictures in one call: of the images API, and of the Python client by gRPC.

They call a gateway that says it is ready, as behind a load balancer. From then on nothing may reach them but a picture:
only who finds nobody listening, or is refused at once, asks again.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict

import httpx

from lightloom.client import AsyncClient, Progress
from services.errors import Code, ServiceError
from tests.faults.clients import RETRY_S, Recipe
from tests.faults.history import Recorder

TIMEOUT_S = 60.0


class WaitingClients:
    """All of them.

    Args:
        urls: of the gateways' REST fronts.
        address: a gRPC target of all gateways.
    """

    def __init__(self, urls: Sequence[str], address: str, recorder: Recorder) -> None:
        self._urls = urls
        self._address = address
        self._recorder = recorder

    async def image(self, recipe: Recipe, *, gateway: int) -> None:
        """A call of the images API."""
        # A connection for each call: one that is kept for long may be closed at the moment when it is used again.
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
            for url in itertools.islice(itertools.cycle(self._urls), gateway, None):
                if not await _ready(http, url):
                    await asyncio.sleep(RETRY_S)
                    continue
                try:
                    answer = await http.post(f"{url}/v1/images/generations", json=_images_body(recipe))
                    break
                except httpx.ConnectError:
                    pass
                except httpx.TransportError as error:
                    self._failed("image", repr(error))
                    return
        if answer.status_code != 200:
            self._failed("image", f"{answer.status_code} {answer.text[:300]}")
            return
        [image] = answer.json()["data"]
        self._made(recipe, image["request_id"], base64.b64decode(image["b64_json"]))

    async def generate(self, recipe: Recipe) -> None:
        """A call of the Python client."""
        seen: list[Progress] = []
        async with AsyncClient(self._address, timeout_s=TIMEOUT_S) as client:
            while True:
                try:
                    result = await client.generate(on_progress=seen.append, **recipe.body())
                    break
                except ServiceError as error:
                    if seen or error.code is not Code.UNAVAILABLE:
                        self._failed("generate", repr(error))
                        return
                await asyncio.sleep(RETRY_S)
        self._made(recipe, result.request_id, result.data)

    def _made(self, recipe: Recipe, request_id: str, data: bytes) -> None:
        self._recorder.write("ok", op="submit", id=request_id, recipe=asdict(recipe))
        self._recorder.write("end", id=request_id, state="done")
        self._recorder.write("result", id=request_id, sha256=hashlib.sha256(data).hexdigest(), nbytes=len(data))

    def _failed(self, op: str, answer: str) -> None:
        self._recorder.write("fail", op=op, answer=answer)


async def _ready(http: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await http.get(f"{url}/health")).status_code == 200
    except (httpx.NetworkError, httpx.RemoteProtocolError):
        # Who connects at the moment when a gateway stops may be cut; nothing has been asked for yet.
        return False


def _images_body(recipe: Recipe) -> dict[str, str | int]:
    size = f"{recipe.side_px}x{recipe.side_px}"
    return {"prompt": recipe.prompt, "seed": recipe.seed, "steps": recipe.steps, "size": size}
