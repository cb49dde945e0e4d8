"""The agent of a host that lends its devices to a group led from another host.

A front connects and says which rank it wants; the agent starts the process and hands the connection over to it. The
rank ends when the connection does, the front notices when the rank does: nothing is relayed. `python -m X_svc.agent`.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import logging
import socket
from pathlib import Path

from services.config import environment_with_malloc
from services.errors import StartupError
from services.rank_handle import MAX_WISH_BYTES, WISH_LENGTH, RankWish, keep_alive
from services.rank_start import rank_command
from services.server import stop_event
from services.telemetry import setup

WISH_TIMEOUT_S = 5.0
ACCEPT_PAUSE_S = 0.1
MAX_CONNECTIONS = 256

_log = logging.getLogger(__name__)


def serve_agent(rank_module: str) -> None:
    """Reads the command line, serves until SIGTERM.

    Args:
        rank_module: the one module it starts processes of.

    Raises:
        StartupError: the address cannot be bound, or it is open to others without a token.
    """
    parser = argparse.ArgumentParser(description="Lends this host's devices to a group led from another host")
    parser.add_argument("--listen", required=True, help="HOST:PORT")
    parser.add_argument("--token-file", type=Path, help="file with the secret that fronts must know")
    parser.add_argument(
        "--drain-timeout-s",
        type=float,
        default=0.0,
        help="how long ranks may go on after SIGTERM: their front may drain",
    )
    arguments = parser.parse_args()
    setup("agent")
    host, _, port = arguments.listen.rpartition(":")
    token = arguments.token_file.read_text().strip() if arguments.token_file else ""
    if not token and host not in ("127.0.0.1", "::1", "localhost"):
        raise StartupError(f"--listen {arguments.listen} is open to other hosts: give --token-file")
    asyncio.run(_serve(_listener(host, int(port)), rank_module, token, arguments.drain_timeout_s))


def _listener(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise StartupError(f"the agent cannot listen on {host}:{port}: {error.strerror}") from error


async def _serve(listener: socket.socket, rank_module: str, token: str, drain_timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    stop = stop_event()
    work: set[asyncio.Task[None]] = set()
    stopped = asyncio.create_task(stop.wait())
    _log.info("listening", extra={"host": listener.getsockname()[0], "port": listener.getsockname()[1]})
    while not stop.is_set():
        accepting = asyncio.create_task(loop.sock_accept(listener))
        await asyncio.wait({accepting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not accepting.done():
            accepting.cancel()
            break
        try:
            connection, _ = accepting.result()
        except OSError as error:
            _log.warning("cannot accept: %s", error)
            await asyncio.sleep(ACCEPT_PAUSE_S)
            continue
        if len(work) >= MAX_CONNECTIONS:
            _log.warning("refused: %d connections are open", len(work))
            connection.close()
            continue
        task = asyncio.create_task(_lend(connection, rank_module, token))
        work.add(task)
        task.add_done_callback(work.discard)
    listener.close()
    if work:
        await asyncio.wait(work, timeout=drain_timeout_s)
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)


async def _lend(connection: socket.socket, rank_module: str, token: str) -> None:
    """One rank process, from its front's wish to its end."""
    with connection:
        connection.setblocking(False)
        keep_alive(connection)
        try:
            wish = RankWish.from_bytes(await asyncio.wait_for(_read_wish(connection), WISH_TIMEOUT_S))
        except (ValueError, TypeError, OSError, TimeoutError) as error:
            _log.warning("a connection that asks for no rank: %s", error)
            return
        if not hmac.compare_digest(wish.token.encode(), token.encode()):
            _log.warning("refused: wrong token")
            return
        try:
            process = await _start(wish, connection, rank_module)
        except OSError as error:
            _log.error("cannot start rank %d: %s", wish.rank, error)
            return
    try:
        code = await process.wait()
        _log.info("rank ended", extra={"rank": wish.rank, "code": code})
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _read_wish(connection: socket.socket) -> bytes:
    (length,) = WISH_LENGTH.unpack(await _exactly(connection, WISH_LENGTH.size))
    if length > MAX_WISH_BYTES:
        raise ValueError(f"a wish of {length} bytes")
    return await _exactly(connection, length)


async def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = await asyncio.get_running_loop().sock_recv(connection, size - len(data))
        if not part:
            raise ValueError("it ended early")
        data += part
    return data


async def _start(wish: RankWish, connection: socket.socket, rank_module: str) -> asyncio.subprocess.Process:
    options = {
        "channel-fd": connection.fileno(),
        "config-json": wish.config_json,
        "rank": wish.rank,
        "world": wish.world,
        "rendezvous": wish.rendezvous,
    }
    process = await asyncio.create_subprocess_exec(
        *rank_command(rank_module, options),
        stdin=asyncio.subprocess.DEVNULL,
        pass_fds=(connection.fileno(),),
        env=environment_with_malloc(),
    )
    _log.info("rank started", extra={"pid": process.pid, "rank": wish.rank})
    return process
