"""How fast tensors travel: `python -m benchmarks.transport`.

Real fronts and rank processes on this machine, over loopback, every tensor with its crc32c, made by the sender. Best of
several runs, because other work on the machine only slows them down; the median stands beside. GB is 10^9 bytes.

    rank_to_client   rank, front, gRPC, this process, which takes the frames as bytes, as a gateway does
    client_to_rank   this process (frames made beforehand), gRPC, front, rank, which checks the checksum
    rank_to_rank     rank, front, gRPC, relay (this process, as a gateway does), gRPC, front, rank, which checks
    small call       from the first message to the end of a call with one small message each way
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.load import write_result
from protos import dit_pb2, types_pb2
from services.client import connect
from services.server import ensure_malloc
from services.tensor_wire import CHUNK_BYTES, chunk_message, end_message, frame_of, header_message

MIB = 1024 * 1024
GOALS = {"one_hop_gb_per_s": 1.0, "rank_to_rank_gb_per_s": 0.4, "relay_growth_mib": 64}
Denoise = grpc.aio.StreamStreamMultiCallable[bytes, bytes]


def start_message(prompt: str, mebibytes: int = 0) -> bytes:
    """The first message of a call to `benchmarks.transport_stage`."""
    context = types_pb2.RequestContext(request_id=f"{prompt}-{time.monotonic_ns()}", fence=1)
    params = types_pb2.GenerationParams(prompt=prompt, steps=mebibytes)
    return dit_pb2.DenoiseRequest(start=dit_pb2.DenoiseStart(context=context, params=params)).SerializeToString()


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def stage(folder: Path, name: str) -> AsyncIterator[Denoise]:
    """A front and its rank; yields its Denoise method on bytes."""
    port = free_port()
    config = folder / f"{name}.toml"
    config.write_text(f'[service]\nport = {port}\nname = "{name}"\n[model]\nname = "{name}"\nsource = "random:0"\n')
    command = (sys.executable, "-m", "benchmarks.transport_stage", "--config", str(config))
    with (folder / f"{name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    try:
        async with connect(f"127.0.0.1:{port}") as channel:
            async for answer in health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60
            ):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
            yield channel.stream_stream("/lightloom.v1.Dit/Denoise")
    finally:
        process.terminate()
        await process.wait()


def upload_messages(mebibytes: int) -> list[bytes]:
    """A bundle as messages, made without torch; its bytes are not random, which makes no difference here."""
    import google_crc32c

    data = bytes(range(256)) * (mebibytes * MIB // 256)
    header = types_pb2.TensorHeader()
    header.tensors.add(
        name="x",
        dtype=types_pb2.DTYPE_UINT8,
        shape=[len(data)],
        nbytes=len(data),
        crc32c=google_crc32c.value(data),
    )
    view = memoryview(data)
    chunks = [chunk_message(0, at, view[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES)]
    return [header_message(header), *chunks, end_message()]


async def rank_to_client(source: Denoise, mebibytes: int) -> None:
    """Takes one bundle."""
    call = source(timeout=60)
    await call.write(start_message("source", mebibytes))
    received = 0
    async for message in call:
        received += len(message)
    assert received > mebibytes * MIB


async def client_to_rank(sink: Denoise, messages: list[bytes]) -> None:
    """Gives one bundle; returns once the rank has checked it."""
    call = sink(timeout=60)
    await call.write(start_message("sink"))
    for message in messages:
        await call.write(message)
    await call.done_writing()
    assert await call.read() is not grpc.aio.EOF


async def rank_to_rank(source: Denoise, sink: Denoise, mebibytes: int) -> None:
    """Relays one bundle without parsing or keeping it."""
    reading, writing = source(timeout=60), sink(timeout=60)
    await asyncio.gather(
        reading.write(start_message("source", mebibytes)), writing.write(start_message("sink", mebibytes))
    )
    async for message in reading:
        if frame_of(message) is not None:
            await writing.write(message)
    await writing.done_writing()
    assert await writing.read() is not grpc.aio.EOF


async def small_call(method: Denoise, prompt: str = "ping", mebibytes: int = 0) -> None:
    """A whole call that moves next to nothing."""
    call = method(timeout=60)
    await call.write(start_message(prompt, mebibytes))
    await call.done_writing()
    async for _ in call:
        pass


async def timed(run: Callable[[], Awaitable[None]], runs: int) -> list[float]:
    """Seconds of each run."""
    seconds = []
    for _ in range(runs):
        started_s = time.perf_counter()
        await run()
        seconds.append(time.perf_counter() - started_s)
    return seconds


def rate(seconds: list[float], mebibytes: int) -> dict[str, float]:
    """GB/s: the first run (on memory that the processes have never touched), the median and the best."""
    gigabytes = mebibytes * MIB / 1e9
    first, median, best = seconds[0], statistics.median(seconds), min(seconds)
    return {name: round(gigabytes / value, 3) for name, value in (("first", first), ("median", median), ("best", best))}


class PeakMemory:
    """The largest growth of this process's resident memory while the block runs."""

    async def __aenter__(self) -> PeakMemory:
        self._before = self._peak = psutil.Process().memory_info().rss
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    @property
    def mebibytes(self) -> float:
        """Growth since the start of the block."""
        return round((self._peak - self._before) / MIB, 1)

    async def _sample(self) -> None:
        while True:
            self._peak = max(self._peak, psutil.Process().memory_info().rss)
            await asyncio.sleep(0.01)


async def measure(mebibytes: int, runs: int, calls: int) -> dict[str, Any]:
    """All figures. The relay comes first, while this process has no memory to spare that would hide its growth."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        async with stage(folder, "source") as source, stage(folder, "sink") as sink:
            await small_call(source, "prepare", mebibytes)
            small = (await timed(lambda: small_call(source), calls))[1:]
            async with PeakMemory() as memory:
                relayed = await timed(lambda: rank_to_rank(source, sink, mebibytes), runs)
            down = await timed(lambda: rank_to_client(source, mebibytes), runs)
            messages = upload_messages(mebibytes)
            up = await timed(lambda: client_to_rank(sink, messages), runs)
    return {
        "work": {"mebibytes": mebibytes, "runs": runs, "small_calls": calls},
        "goals": GOALS,
        "gb_per_s": {
            "rank_to_client": rate(down, mebibytes),
            "client_to_rank": rate(up, mebibytes),
            "rank_to_rank": rate(relayed, mebibytes),
        },
        "relay_growth_mib": memory.mebibytes,
        "small_call_ms": {
            "median": round(1000 * statistics.median(small), 2),
            "p95": round(1000 * sorted(small)[int(len(small) * 0.95)], 2),
        },
    }


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=200, help="size of the bundle that travels")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--calls", type=int, default=300, help="how many small calls")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/transport.json"))
    arguments = parser.parse_args()
    ensure_malloc()
    facts = asyncio.run(measure(arguments.mebibytes, arguments.runs, arguments.calls))
    write_result(arguments.json, "transport", facts)


if __name__ == "__main__":
    main()
