"""Clients of a cluster under faults: they try again at another gateway, and write everything down."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import httpx

from tests.faults.aborter import NO_ANSWER, Aborter
from tests.faults.history import Recorder

TERMINAL = ("done", "failed", "cancelled", "expired")
PATIENCE_S = 90.0
RETRY_S = 0.1
# Instead of a state: it was accepted, and nobody knows of it any more.
LOST = "lost"
# A call that a gateway does not answer in this time is a hang.
ANSWER_S = 20.0
# Silence on an event stream after which a client asks another gateway.
QUIET_S = 10.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a picture is made of: the same recipe gives the same bytes."""

    prompt: str
    seed: int
    steps: int = 20
    side_px: int = 64

    def body(self) -> dict[str, Any]:
        """Of `POST /v1/requests`."""
        sides = {"width": self.side_px, "height": self.side_px}
        return {"prompt": self.prompt, "seed": self.seed, "steps": self.steps, **sides}


class Clients:
    """As many clients as calls are made at once. Use it as an async context manager."""

    def __init__(self, urls: Iterable[str], recorder: Recorder, name: str) -> None:
        self._urls = list(urls)
        self._recorder = recorder
        self._name = name
        self._numbers = itertools.count()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
        self._http = httpx.AsyncClient(limits=limits, timeout=ANSWER_S)

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def submit(self, recipe: Recipe, *, gateway: int = 0, patience_s: float = PATIENCE_S, key: str = "") -> str:
        """The id of an accepted request; empty when it was refused for longer than `patience_s`."""
        key = key or f"{self._name}-{next(self._numbers)}"
        self._recorder.write("invoke", op="submit", key=key, recipe=asdict(recipe))
        loop = asyncio.get_running_loop()
        end_s = loop.time() + patience_s
        for attempt in itertools.count():
            started_s = loop.time()
            answer = await self._call(
                "POST", gateway + attempt, "/v1/requests", json=recipe.body(), headers={"Idempotency-Key": key}
            )
            facts = {"op": "submit", "key": key, "status": answer.status_code, "seconds": loop.time() - started_s}
            if answer.status_code == 202:
                request_id = str(answer.json()["id"])
                self._recorder.write("ok", **facts, id=request_id, recipe=asdict(recipe))
                return request_id
            # No answer, refused for now, or away: the same key may be sent again.
            passing = answer.status_code in (NO_ANSWER, 429, 503)
            facts |= {"retry_after": answer.headers.get("retry-after", ""), "answer": answer.text[:300]}
            self._recorder.write("info" if passing else "fail", **facts)
            if not passing or loop.time() >= end_s:
                break
            await asyncio.sleep(float(facts["retry_after"] or RETRY_S))
        return ""

    async def follow(self, request_id: str, *, gateway: int = 0) -> str:
        """Every event until the end, resumed at another gateway when a stream breaks. Its end, or LOST."""
        last, state = "", ""
        end_s = asyncio.get_running_loop().time() + 2 * PATIENCE_S
        for attempt in itertools.count(gateway):
            url = f"{self._url(attempt)}/v1/requests/{request_id}/events"
            headers = {"Last-Event-ID": last} if last else {}
            try:
                async with self._http.stream("GET", url, headers=headers, timeout=QUIET_S) as answer:
                    if answer.status_code == 404:
                        self._recorder.write("lost", id=request_id)
                        return LOST
                    if answer.status_code == 200:
                        name = ""
                        async for line in answer.aiter_lines():
                            kind, _, value = line.partition(": ")
                            if kind == "id":
                                last = value
                            elif kind == "event":
                                name = value
                            elif kind == "data" and name != "error":
                                state = self._event(request_id, last, name, json.loads(value)) or state
            except httpx.TransportError as error:
                self._recorder.write("info", op="follow", id=request_id, answer=repr(error)[:200])
            if state in TERMINAL:
                self._recorder.write("end", id=request_id, state=state)
                return state
            if asyncio.get_running_loop().time() > end_s:
                self._recorder.write("fail", op="follow", id=request_id, answer="no end in sight")
                return ""
            await asyncio.sleep(RETRY_S)
        raise AssertionError("never here")

    def _event(self, request_id: str, event_id: str, name: str, data: dict[str, Any]) -> str:
        state = str(data.get("state", "")) if name == "status" else ""
        self._recorder.write("event", id=request_id, event=event_id, name=name, state=state, step=data.get("step", 0))
        return state

    async def fetch(self, request_id: str, *, gateway: int = 0) -> str:
        """The sha256 of a result; empty when no gateway has it."""
        for attempt in range(gateway, gateway + 20):
            answer = await self._call("GET", attempt, f"/v1/requests/{request_id}/content")
            if answer.status_code == 200:
                sha256 = hashlib.sha256(answer.content).hexdigest()
                self._recorder.write("result", id=request_id, sha256=sha256, nbytes=len(answer.content))
                return sha256
            await asyncio.sleep(RETRY_S)
        self._recorder.write("fail", op="fetch", id=request_id, status=answer.status_code)
        return ""

    async def run(self, recipe: Recipe, *, gateway: int = 0) -> str:
        """Submits, follows and fetches; the state it ended in. One that was lost is submitted again, under its key."""
        key, state = f"{self._name}-{next(self._numbers)}", LOST
        while state == LOST:
            request_id = await self.submit(recipe, gateway=gateway, key=key)
            if not request_id:
                return ""
            state = await self.follow(request_id, gateway=gateway)
        if state == "done":
            await self.fetch(request_id, gateway=gateway)
        return state

    async def abort(self, aborter: Aborter, request_id: str, *, gateway: int = 0) -> str:
        """The state that the abort's answer says; tried until there is one."""
        self._recorder.write("invoke", op="abort", id=request_id)
        for attempt in range(gateway, gateway + 100):
            answer = await aborter.abort(f"{self._url(attempt)}/v1/requests/{request_id}")
            facts = {"op": "abort", "id": request_id, "t": answer.t}
            if answer.status == 200:
                self._recorder.write("ok", **facts, state=answer.state, seconds=answer.seconds)
                return answer.state
            self._recorder.write("info", **facts, status=answer.status)
            await asyncio.sleep(RETRY_S)
        return ""

    async def _call(self, method: str, gateway: int, path: str, **options: Any) -> httpx.Response:
        """The answer; one with the status NO_ANSWER and the error as its text when there was none."""
        try:
            return await self._http.request(method, self._url(gateway) + path, **options)
        except httpx.TransportError as error:
            return httpx.Response(NO_ANSWER, text=repr(error))

    def _url(self, gateway: int) -> str:
        return self._urls[gateway % len(self._urls)]
