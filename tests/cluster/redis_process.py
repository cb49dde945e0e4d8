"""Redis servers and Sentinels as real processes, configured as tests need them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import redis

from lightloom.redis_server import find_server
from services.free_port import free_port
from tests.cluster.running import wait_for

SERVICE = "lightloom"


class RedisProcess:
    """A server, or with `sentinel` a Sentinel, on a loopback port.

    Args:
        lines: of its configuration file, beside port and folder.
    """

    def __init__(self, folder: Path, *lines: str, sentinel: bool = False, port: int = 0) -> None:
        self.port = port or free_port()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "redis.conf"
        common = (f"port {self.port}", "bind 127.0.0.1", f"dir {folder}", f"logfile {folder}/redis.log")
        own = () if sentinel else ("appendonly no", 'save ""')
        file.write_text("\n".join((*common, *own, *lines)) + "\n")
        command = [str(find_server()), str(file), *(["--sentinel"] if sentinel else [])]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def admin(self, **options: object) -> redis.Redis:
        """A client for the test's own questions."""
        return redis.Redis(port=self.port, socket_timeout=5, decode_responses=True, **options)

    def stop(self) -> None:
        """Kills it, also when it is stopped."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def redis_process(folder: Path, *lines: str, **options: object) -> Iterator[RedisProcess]:
    """A server that takes connections."""
    running = RedisProcess(folder, *lines, **options)
    try:
        wait_for(lambda: _answers(running.port), 20)
        yield running
    finally:
        running.stop()


@contextlib.contextmanager
def own_redis(folder: Path) -> Iterator[str]:
    """The URL of a server of one's own: any gateway of a Redis takes its requests, to its own stages and store."""
    with redis_process(folder / "redis") as server:
        yield f"redis://127.0.0.1:{server.port}/0"


def _answers(port: int) -> bool:
    try:
        redis.Redis(port=port, socket_timeout=1).ping()
    except redis.AuthenticationError:
        return True
    except redis.RedisError:
        return False
    return True


class Sentinels:
    """A primary, its replicas and the Sentinels that watch them."""

    def __init__(self, servers: Sequence[RedisProcess], guards: Sequence[RedisProcess]) -> None:
        self._servers = {server.port: server for server in servers}
        self._guards = guards

    @property
    def sentinel_url(self) -> str:
        """For a gateway."""
        hosts = ",".join(f"127.0.0.1:{guard.port}" for guard in self._guards)
        return f"sentinel://{hosts}/{SERVICE}"

    @property
    def primary(self) -> RedisProcess:
        """The server that the Sentinels name now."""
        return self._servers[int(self._guards[0].admin().sentinel_master(SERVICE)["port"])]

    def in_step(self) -> bool:
        """Whether every Sentinel knows all others and all replicas."""
        facts = [guard.admin().sentinel_master(SERVICE) for guard in self._guards]
        others, replicas = len(self._guards) - 1, len(self._servers) - 1
        return all((fact["num-other-sentinels"], fact["num-slaves"]) == (others, replicas) for fact in facts)


@contextlib.contextmanager
def sentinels(folder: Path) -> Iterator[Sentinels]:
    """A primary, two replicas and three Sentinels, in step."""
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(redis_process(folder / "0", "repl-diskless-sync-delay 0"))
        follow = (f"replicaof 127.0.0.1 {primary.port}", "repl-diskless-sync-delay 0")
        replicas = [stack.enter_context(redis_process(folder / str(index), *follow)) for index in (1, 2)]
        wait_for(lambda: all(r.admin().info("replication")["master_link_status"] == "up" for r in replicas), 30)
        watch = (
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} 2",
            f"sentinel down-after-milliseconds {SERVICE} 1000",
            f"sentinel failover-timeout {SERVICE} 5000",
        )
        guards = [stack.enter_context(redis_process(folder / f"s{index}", *watch, sentinel=True)) for index in range(3)]
        found = Sentinels((primary, *replicas), guards)
        wait_for(found.in_step, 60)
        yield found


class Relay:
    """Passes connections on to a port that can be changed, as an address that follows a failover does.

    Args:
        context: makes it TLS on the outer side, as stunnel does for a server without TLS of its own.
    """

    def __init__(self, target: int, context: ssl.SSLContext | None = None) -> None:
        self.target = target
        self.port = 0
        self._context = context

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._server.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self.target)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
