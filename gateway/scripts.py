"""The Lua scripts of `gateway/lua/`, and how long a call waits for a Redis that is away. Knows nothing of requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, ReadOnlyError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from gateway.config import RedisSection
from gateway.redis_link import open_redis
from services.errors import StateStoreDown

log = logging.getLogger(__name__)

NAMES = (
    *("submit", "claim", "sweep", "beat", "checkpoint", "commit", "requeue"),
    *("abort", "expired", "follow", "charge", "echo", "backlog", "told"),
)
FOLDER = Path(__file__).parent / "lua"
# How long a call waits for a Redis that is away: who asks is told soon.
PATIENCE_S = 2.0
RETRY_S = 0.1
# Commands under way at once, each on a connection of its own: Redis does one after the other, and a crowd that opened
# hundreds of connections would keep the event loop from all else meanwhile.
AT_ONCE = 16
# Of those that go ahead: they are short, and a few connections that stay open carry many.
AT_ONCE_AHEAD = 4


def source(name: str) -> str:
    """The whole text of a script: what all share, the queue's functions, its own part."""
    return "".join((FOLDER / f"{part}.lua").read_text() for part in ("common", "queue", name))


def heed_cancel() -> None:
    """A cancel that meets an answer, or the end of a connection, can be lost in the library; its count stays.

    Raises:
        CancelledError: the task has been cancelled.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class Scripts:
    """Runs scripts and commands; raises StateStoreDown when Redis does not answer, or only with an error."""

    def __init__(self, section: RedisSection) -> None:
        # Tries are counted in time, by `call`.
        self.redis: Redis = open_redis(section)
        self._turns = asyncio.Semaphore(AT_ONCE)
        # Connections of their own, open before they are needed: opening one takes several ways to Redis and back, each
        # of them a turn of a loop that a crowd keeps busy.
        self._ahead: Redis = open_redis(section)
        self._turns_ahead = asyncio.Semaphore(AT_ONCE_AHEAD)
        self.by_name = {name: self.redis.register_script(source(name)) for name in NAMES}

    async def run(
        self, name: str, keys: list[str], *arguments: Any, patience_s: float = PATIENCE_S, ahead: bool = False
    ) -> Any:
        """One EVALSHA.

        Args:
            ahead: it waits for none of the commands that others have asked for before.
        """
        redis, turns = (self._ahead, self._turns_ahead) if ahead else (self.redis, self._turns)

        async def ask() -> Any:
            return await self.by_name[name](keys=keys, args=list(arguments), client=redis)

        return await self._tried(ask, turns, patience_s)

    async def open_ahead(self) -> None:
        """Opens the connections of those that go ahead, and loads the script of aborts."""
        text = str(self.by_name["abort"].script)

        async def load() -> None:
            await self._tried(lambda: self._ahead.script_load(text), self._turns_ahead, PATIENCE_S)

        await asyncio.gather(*(load() for _ in range(AT_ONCE_AHEAD)))

    async def call(self, command: Callable[[], Awaitable[Any]], patience_s: float = PATIENCE_S) -> Any:
        """A command to `redis`, tried again for `patience_s` while Redis is away."""
        return await self._tried(command, self._turns, patience_s)

    async def _tried(self, command: Callable[[], Awaitable[Any]], turns: asyncio.Semaphore, patience_s: float) -> Any:
        # A script may have run although its answer was lost. Each may run again: a second claim takes another request,
        # and the first one's lease runs out.
        refusal: RedisError | None = None
        try:
            async with asyncio.timeout(patience_s):
                while True:
                    try:
                        # A server that stands still must not keep the turns of those whose patience is short.
                        async with turns, asyncio.timeout(PATIENCE_S):
                            answer = await command()
                        heed_cancel()
                        return answer
                    except AuthenticationError as error:
                        refusal = error
                    except (RedisConnectionError, RedisTimeoutError, OSError):
                        await self._drop_idle()
                    except ReadOnlyError as error:
                        # After a failover the connections still lead to the old primary.
                        refusal = error
                        await self._drop_idle()
                    except RedisError as error:
                        # Full, or unable to save: an answer, but as passing as none.
                        refusal = error
                    heed_cancel()
                    await asyncio.sleep(RETRY_S)
        except TimeoutError as error:
            await self._drop_idle()
            if refusal is not None:
                log.error("Redis refuses commands: %s", refusal)
            what = "does not answer" if refusal is None else "refuses commands"
            raise StateStoreDown(f"the state store {what}: try again later", retry_after_s=1.0) from error

    async def _drop_idle(self) -> None:
        """Where one connection leads to a server that is no more, so do the others: they are not tried in turn."""
        for redis in (self.redis, self._ahead):
            await redis.connection_pool.disconnect(inuse_connections=False)

    async def close(self) -> None:
        """Closes the connections."""
        await self.redis.aclose()
        await self._ahead.aclose()
