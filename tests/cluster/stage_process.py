"""Runs a stage's front as a real process, and talks with it over gRPC. The fake stage, unless told otherwise."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import dit_pb2, dit_pb2_grpc, types_pb2
from services.client import connect, error_from_rpc
from services.errors import ServiceError
from services.free_port import free_port

ROOT = Path(__file__).resolve().parents[2]


class StageProcess:
    """The process, its log and a channel to it.

    Args:
        module: what `python -m` runs.
        serves: its gRPC service.
        settings: what to change in the config, by dotted key.
        service: keys of the config's section `service`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        module: str = "tests.cluster.fake_stage",
        serves: str = "Dit",
        preset: str = "",
        settings: Mapping[str, object] | None = None,
        **service: object,
    ) -> None:
        self.port = free_port()
        self.metrics_port = free_port()
        self.log = folder / "stage.log"
        self.process: asyncio.subprocess.Process
        self._settings = {"service.port": self.port, "service.metrics_port": self.metrics_port, "model.preset": preset}
        self._settings |= {f"service.{key}": value for key, value in service.items()} | dict(settings or {})
        self._module = module
        self._serves = f"lightloom.v1.{serves}"
        self._config = folder / "stage.toml"
        self._config.write_text(f'[service]\nname = "fake"\n[model]\nname = "fake"\nsource = "{folder / "marker"}"\n')
        self.channel = connect(f"127.0.0.1:{self.port}")
        self.stub = dit_pb2_grpc.DitStub(self.channel)

    async def start(self) -> None:
        settings = [f"--set={key}={json.dumps(value)}" for key, value in self._settings.items()]
        with self.log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self._module, "--config", str(self._config), *settings),
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    async def health(self) -> str:
        """SERVING, NOT_SERVING, or UNREACHABLE."""
        try:
            answer = await health_pb2_grpc.HealthStub(self.channel).Check(
                health_pb2.HealthCheckRequest(service=self._serves), timeout=2
            )
        except grpc.RpcError:
            return "UNREACHABLE"
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    async def until(self, status: str, timeout_s: float = 30.0) -> None:
        """Waits for a health status."""
        async with asyncio.timeout(timeout_s):
            while await self.health() != status:
                assert self.process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.02)

    async def describe(self) -> types_pb2.DescribeResponse:
        return await self.stub.Describe(types_pb2.DescribeRequest(), timeout=5)

    async def rank_pid(self) -> int:
        return int((await self.describe()).device)

    async def figure(self, name: str) -> float:
        """A number of the metrics page; 0 when it is not there."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())
        return next((float(line.split()[-1]) for line in page.splitlines() if line.split()[0] == name), 0.0)

    async def until_figure(self, name: str, value: float, timeout_s: float = 10.0) -> None:
        """Waits for a number of the metrics page."""
        async with asyncio.timeout(timeout_s):
            while await self.figure(name) != value:
                await asyncio.sleep(0.05)

    async def exit_code(self, timeout_s: float = 30.0) -> int:
        async with asyncio.timeout(timeout_s):
            return await self.process.wait()

    def last_line(self) -> str:
        return self.log.read_text().splitlines()[-1]

    async def stop(self) -> None:
        await self.channel.close()
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGKILL)
            await self.process.wait()


@asynccontextmanager
async def stage(folder: Path, *, start_timeout_s: float = 30.0, **options: object) -> AsyncIterator[StageProcess]:
    """A stage that serves; options as StageProcess."""
    running = StageProcess(folder, **options)
    await running.start()
    try:
        await running.until("SERVING", start_timeout_s)
        yield running
    finally:
        await running.stop()


def start_message(
    prompt: str, *, request_id: str = "r1", steps: int = 1, bundles: int = 0, fence: int = 1
) -> dit_pb2.DenoiseRequest:
    """The first message of a call."""
    start = dit_pb2.DenoiseStart(
        context=types_pb2.RequestContext(request_id=request_id, fence=fence),
        params=types_pb2.GenerationParams(model="fake", prompt=prompt, steps=steps),
        num_bundles=bundles,
    )
    return dit_pb2.DenoiseRequest(start=start)


async def run_call(stub: dit_pb2_grpc.DitStub, *messages: dit_pb2.DenoiseRequest, **options: object) -> list:
    """Sends the messages, half-closes, returns the responses. Raises ServiceError."""
    call = stub.Denoise(iter(messages), **{"timeout": 30, **options})
    try:
        return [response async for response in call]
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error


async def failure(stub: dit_pb2_grpc.DitStub, *messages: dit_pb2.DenoiseRequest, **options: object) -> ServiceError:
    """The error of a call that must fail."""
    try:
        await run_call(stub, *messages, **options)
    except ServiceError as error:
        return error
    raise AssertionError("the call did not fail")
