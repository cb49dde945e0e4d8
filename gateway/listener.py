"""Hears what all gateways' scripts publish, so that nobody has to ask again and again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from gateway.config import RedisSection
from gateway.followers import Followers
from gateway.records import PREFIX, WAKE
from gateway.redis_link import examine, open_redis, refusal_of
from gateway.scripts import Scripts, heed_cancel
from services.errors import StartupError, StateStoreDown

log = logging.getLogger(__name__)

# After so long without a message, the listener tells itself one; after as long again without it, it connects anew.
SILENCE_S = 2.0


class Listener:
    """A connection of its own. What `owner` has published itself is passed over: it knows that already."""

    def __init__(self, section: RedisSection, scripts: Scripts, owner: str, followers: Followers) -> None:
        self._redis: Redis = open_redis(section)
        self._scripts = scripts
        self._owner = owner
        self._followers = followers
        self.connected = False

    async def run(self, on_queue: Callable[[], None], on_cancel: Callable[[str], None]) -> None:
        """Hands on what all gateways' scripts change, for ever: work in a queue, an abort, an event to read.

        Raises:
            StartupError: this Redis may throw away what it is told.
        """
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(WAKE)
                    if refusal := refusal_of(await examine(self._redis)):
                        raise StartupError(refusal)
                    await self._scripts.open_ahead()
                    self.connected = True
                    on_queue()
                    await self._hear_all(channel, on_queue, on_cancel)
            except (RedisError, OSError, StateStoreDown) as error:
                heed_cancel()
                self.connected = False
                log.warning("Redis cannot be listened to: %s", error)
                await asyncio.sleep(0.5)

    async def _hear_all(self, channel: PubSub, on_queue: Callable[[], None], on_cancel: Callable[[str], None]) -> None:
        """Hears until nothing comes any more, not even our own word: after a failover, the channel may lead nowhere.

        Raises:
            RedisError, StateStoreDown: it is to be opened again.
        """
        spoken = False
        while True:
            message = await channel.get_message(timeout=SILENCE_S)
            heed_cancel()
            if message is not None:
                self._hear(message["data"].decode(), on_queue, on_cancel)
            elif spoken:
                raise RedisConnectionError("the channel is silent: it leads to another server than commands do")
            else:
                await self._scripts.run("echo", [f"{PREFIX}:echo"], self._owner)
            spoken = message is None

    def _hear(self, message: str, on_queue: Callable[[], None], on_cancel: Callable[[str], None]) -> None:
        kind, _, rest = message.partition(":")
        sender, _, request_id = rest.rpartition(":")
        if sender == self._owner:
            return
        if kind == "q":
            on_queue()
        elif kind == "c":
            on_cancel(request_id)
        else:
            self._followers.wake(request_id)

    async def close(self) -> None:
        """Closes the connection."""
        await self._redis.aclose()
