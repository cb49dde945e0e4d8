"""A rank process as its front holds it: started here or by another host's agent, and the front's end of its channel."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from services.channel import AsyncChannel, Frame
from services.config import StageConfig, environment_with_malloc
from services.rank_start import rank_command

SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
CONNECT_TIMEOUT_S = 5.0
DEAD_HOST_S = 10
WISH_LENGTH = struct.Struct("<I")
MAX_WISH_BYTES = 100 * 1024

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """A process's place in its group.

    Attributes:
        rank, world: number of the rank, and how many there are.
        rendezvous: where the ranks find each other, as torch.distributed takes it.
    """

    rank: int
    world: int
    rendezvous: str


class Rank(Protocol):
    """A running rank process, wherever it runs."""

    channel: AsyncChannel
    place: Place

    @property
    def gone(self) -> bool:
        """Whether it has ended, or cannot be heard any more."""

    def kill(self) -> None:
        """Ends the process at once."""

    async def end(self, grace_s: float) -> str:
        """Waits for the end, brings it about after `grace_s`, and says how it came."""


class LocalRank:
    """A rank process on this host."""

    def __init__(self, process: asyncio.subprocess.Process, channel: AsyncChannel, place: Place) -> None:
        self._process = process
        self.channel = channel
        self.place = place
        self._exited: asyncio.Task[int] = asyncio.create_task(process.wait())

    @classmethod
    async def spawn(
        cls,
        config: StageConfig,
        module: str,
        place: Place,
        on_frame: Callable[[Frame], None],
        on_closed: Callable[[], None],
    ) -> LocalRank:
        """Starts the module as a rank process at its place."""
        ours, theirs = _socket_pair()
        channel = AsyncChannel(ours, on_frame, on_closed)
        arguments = {
            "channel-fd": theirs.fileno(),
            "config-json": json.dumps(asdict(config)),
            "rank": place.rank,
            "world": place.world,
            "rendezvous": place.rendezvous,
        }
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *rank_command(module, arguments),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=environment_with_malloc(),
            )
        _log.info("rank started", extra={"pid": process.pid, "rank": place.rank})
        return cls(process, channel, place)

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self._exited.done()

    def kill(self) -> None:
        """Ends the process at once."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def end(self, grace_s: float) -> str:
        """Waits for the end, brings it about after `grace_s`, and says how it came."""
        try:
            await asyncio.wait_for(asyncio.shield(self._exited), grace_s)
        except TimeoutError:
            self.kill()
        code = await self._exited
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class RemoteRank:
    """A rank process that another host's agent (`services/rank_agent.py`) has started: its channel is a connection."""

    def __init__(self, agent: str, place: Place) -> None:
        self.place = place
        self.channel: AsyncChannel
        self._agent = agent
        self._closed = asyncio.Event()

    @classmethod
    async def spawn(
        cls,
        config: StageConfig,
        agent: str,
        place: Place,
        on_frame: Callable[[Frame], None],
        on_closed: Callable[[], None],
    ) -> RemoteRank:
        """Asks the agent at `host:port` for a rank.

        Raises:
            OSError: it does not answer (TimeoutError within seconds), or the token's file cannot be read.
        """
        rank = cls(agent, place)
        wish = RankWish(
            token=_secret(config.parallel.agent_token_file),
            config_json=json.dumps(asdict(config)),
            rank=place.rank,
            world=place.world,
            rendezvous=place.rendezvous,
        )
        connection = await _connect(agent, wish.to_bytes())

        def closed() -> None:
            rank._closed.set()
            on_closed()

        rank.channel = AsyncChannel(connection, on_frame, closed)
        _log.info("rank asked for", extra={"agent": agent, "rank": place.rank})
        return rank

    @property
    def gone(self) -> bool:
        """Whether the connection has ended."""
        return self._closed.is_set()

    def kill(self) -> None:
        """Closes the connection: a rank without a front ends at once."""
        self.channel.close()

    async def end(self, grace_s: float) -> str:
        """Waits for the end of the connection, and closes it after `grace_s`."""
        try:
            await asyncio.wait_for(self._closed.wait(), grace_s)
        except TimeoutError:
            self.kill()
        return f"the connection to {self._agent} ended"


@dataclass(frozen=True, slots=True)
class RankWish:
    """What a front asks an agent for, as the first bytes of a connection: length, then JSON."""

    token: str
    config_json: str
    rank: int
    world: int
    rendezvous: str

    def to_bytes(self) -> bytes:
        """As it travels."""
        data = json.dumps(asdict(self)).encode()
        return WISH_LENGTH.pack(len(data)) + data

    @classmethod
    def from_bytes(cls, data: bytes) -> RankWish:
        """From the JSON.

        Raises:
            ValueError, TypeError: it is not one.
        """
        wish = cls(**json.loads(data))
        texts, numbers = (wish.token, wish.config_json, wish.rendezvous), (wish.rank, wish.world)
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(number, int) for number in numbers):
            raise TypeError("a wish has texts and whole numbers")
        return wish


def _secret(file: str) -> str:
    # Read when it is needed: no config, log or command line ever holds it.
    return Path(file).read_text().strip() if file else ""


async def _connect(agent: str, first: bytes) -> socket.socket:
    """A connection on which `first` has been sent, without a moment's stop of the event loop."""
    loop = asyncio.get_running_loop()
    host, _, port = agent.rpartition(":")
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            [address, *_] = await loop.getaddrinfo(host, int(port), family=socket.AF_INET, type=socket.SOCK_STREAM)
            await loop.sock_connect(connection, address[4])
            keep_alive(connection)
            await loop.sock_sendall(connection, first)
    except BaseException:
        connection.close()
        raise
    return connection


def keep_alive(connection: socket.socket) -> None:
    """A host that is gone without a word is noticed within DEAD_HOST_S seconds."""
    options = {
        (socket.IPPROTO_TCP, socket.TCP_NODELAY): 1,
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 2,
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 2,
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): DEAD_HOST_S // 2 - 1,
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 1000 * DEAD_HOST_S,
    }
    for (level, name), value in options.items():
        connection.setsockopt(level, name, value)


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """Ends with buffers for a few chunks (as far as the kernel lets us)."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    return ends
