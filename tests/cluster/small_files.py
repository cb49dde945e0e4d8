"""`python -m tests.cluster.small_files FOLDER`: a store in a process whose files may not grow beyond 100 kB."""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import Callable

from gateway.config import StoreSection
from gateway.store import open_store
from gateway.store_writes import MAX_WAITING_BYTES
from protos import gateway_pb2

LATER = float("inf")
MIB = bytes(1024 * 1024)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def main(folder: str) -> None:
    store = open_store(StoreSection(path=folder))
    opened = asyncio.Event()
    store.writes.on_open = opened.set
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    large = asyncio.create_task(store.put_latents("large", [MIB], LATER))
    await opened.wait()
    await store.put("small.1", b"x", gateway_pb2.Artifact(), LATER)
    print("small ones go on", large.done())
    # The same MiB again and again: as much to write, but not to hold.
    many = asyncio.create_task(store.put_latents("many", [MIB] * (MAX_WAITING_BYTES // len(MIB)), LATER))
    await until(lambda: store.writes.refusal is not None)
    # Room is looked for once a second.
    await asyncio.sleep(1.5)
    print("too much waits", store.writes.refusal is not None)
    many.cancel()
    await until(lambda: store.writes.refusal is None)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    await large
    print("all is well", len((await store.latents("large"))[0]))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
