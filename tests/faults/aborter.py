"""Aborts from a process of their own: one that follows two hundred streams would measure its own stalls.

`python -m tests.faults.aborter` reads a request's number and URL from each line, and answers with an `Answer` as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from types import TracebackType

import httpx

# Instead of a status.
NO_ANSWER = 599
TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Answer:
    """`t`: when it came, in Unix seconds; `seconds`: how long it took; `state`: empty unless the status is 200."""

    number: int
    status: int
    state: str
    t: float
    seconds: float


class Aborter:
    """The process. Use it as an async context manager."""

    def __init__(self) -> None:
        self._asked: list[asyncio.Future[Answer]] = []

    async def __aenter__(self) -> Aborter:
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-m", "tests.faults.aborter")
        self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        await self._answers.readline()
        self._hearing = asyncio.create_task(self._hear())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._requests.close()
        await self._hearing
        await self._process.wait()

    async def abort(self, url: str) -> Answer:
        """DELETE of a request's URL."""
        answer = asyncio.get_running_loop().create_future()
        self._requests.write(f"{len(self._asked)} {url}\n".encode())
        self._asked.append(answer)
        return await answer

    async def _hear(self) -> None:
        while line := await self._answers.readline():
            answer = Answer(**json.loads(line))
            self._asked[answer.number].set_result(answer)


async def _serve() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = set()
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        with contextlib.suppress(httpx.TransportError):
            # The first call loads half of the library, which takes 20 ms: it is made to a port that nobody has.
            await client.delete("http://127.0.0.1:1")
        print("ready", flush=True)
        while line := (await reader.readline()).decode():
            number, url = line.split()
            tasks.add(asyncio.create_task(_delete(client, int(number), url)))
        await asyncio.gather(*tasks)


async def _delete(client: httpx.AsyncClient, number: int, url: str) -> None:
    started_s = time.monotonic()
    try:
        answer = await client.delete(url)
        status, state = answer.status_code, answer.json()["state"] if answer.status_code == 200 else ""
    except httpx.TransportError:
        status, state = NO_ANSWER, ""
    print(json.dumps(asdict(Answer(number, status, state, time.time(), time.monotonic() - started_s))), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve())
