"""The cluster on one machine: Redis, stage services and gateway as child processes.

`lightloom up` runs a `Cluster` until Ctrl-C; `make demo` runs one around a single picture. State lives in a run
folder: configs, logs, artifacts, Redis data, the address lists that the gateway follows, and a control socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from lightloom.child import Child, first_failure
from lightloom.cluster_config import STAGES, ClusterConfig, ModelEntry, write_toml
from lightloom.redis_server import RedisServer, start_redis
from services.config import TlsSection, environment_with_malloc
from services.errors import StartupError

POLL_S = 0.1
REDIS_POLL_S = 0.5
# Longer than a gateway takes to notice that an address left its list.
LEAVE_S = 2.5
STOP_GRACE_S = 10.0


class Cluster:
    """Starts, scales and stops the processes. Use it as an async context manager."""

    def __init__(self, config: ClusterConfig, run_dir: Path) -> None:
        gateway = config.gateway
        self.config = replace(
            config,
            gateway=replace(
                gateway,
                http_port=gateway.http_port or free_port(),
                grpc_port=gateway.grpc_port or free_port(),
            ),
        )
        self.run_dir = run_dir.absolute()
        self._gateways: list[Child] = []
        self._replicas: dict[tuple[str, str], list[tuple[str, Child]]] = {}
        self._redis: RedisServer | None = None
        self._redis_watch: asyncio.Task[None] | None = None
        self._started = 0
        self._control: asyncio.Server | None = None

    @property
    def http_address(self) -> str:
        """host:port of the first gateway's REST front."""
        return f"{self.config.gateway.host}:{self.config.gateway.http_port}"

    @property
    def grpc_address(self) -> str:
        """host:port of the first gateway's gRPC front."""
        return f"{self.config.gateway.host}:{self.config.gateway.grpc_port}"

    async def __aenter__(self) -> Cluster:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts everything; returns when the processes run (see `wait_ready`).

        Raises:
            StartupError: Redis cannot be had, or another cluster uses the run folder.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        await self._open_control()
        # In this thread, although it waits: the server ends with the thread that starts it, and nothing else runs yet.
        self._redis = start_redis(self.run_dir / "redis", self.config.redis_url)
        self._redis_watch = asyncio.create_task(self._keep_redis(self._redis), name="watch redis")
        for stage in STAGES:
            self._address_file(stage).parent.mkdir(exist_ok=True)
            self._address_file(stage).write_text("")
        for model, entry in self.config.models.items():
            for stage in STAGES:
                await self.scale(model, stage, entry.replicas.get(stage, 1))
        for index in range(self.config.gateway.replicas):
            await self._start_gateway(index)
        self._write_cluster_file()

    async def wait_ready(self, timeout_s: float = 1800.0) -> None:
        """Waits until every model has all its stages.

        Raises:
            StartupError: a process gave up, or the time is over.
        """
        failure = asyncio.create_task(first_failure(self._children()))
        ready = asyncio.create_task(self._poll_health())
        done, pending = await asyncio.wait({failure, ready}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if not done:
            raise StartupError(f"not ready after {timeout_s:.0f} s: see {self.run_dir / 'logs'}")
        done.pop().result()

    async def wait_failure(self) -> None:
        """Waits until a process gives up for good, then raises StartupError with its reason."""
        await first_failure(self._children())

    async def scale(self, model: str, stage: str, count: int) -> None:
        """Brings a stage of a model to `count` replicas; those that leave finish their work first."""
        replicas = self._replicas.setdefault((model, stage), [])
        for _ in range(count - len(replicas)):
            replicas.append(await self._start_stage(model, self.config.models[model], stage))
        leaving = replicas[count:]
        del replicas[count:]
        self._write_addresses(stage)
        if leaving:
            await asyncio.sleep(LEAVE_S)
            await asyncio.gather(*(child.stop(60.0) for _, child in leaving))

    def status(self) -> list[dict[str, Any]]:
        """One row a process: name, address, pid, restarts."""
        rows = [
            {"name": child.name, "address": address, "pid": child.pid, "restarts": child.restarts}
            for replicas in self._replicas.values()
            for address, child in replicas
        ]
        return rows + [{"name": c.name, "address": "", "pid": c.pid, "restarts": c.restarts} for c in self._gateways]

    async def stop(self) -> None:
        """Stops gateways, then stages, then Redis. No process is left."""
        await asyncio.gather(*(child.stop(STOP_GRACE_S) for child in self._gateways))
        stages = [child for replicas in self._replicas.values() for _, child in replicas]
        await asyncio.gather(*(child.stop(STOP_GRACE_S) for child in stages))
        if self._redis and self._redis_watch:
            self._redis_watch.cancel()
            await asyncio.to_thread(self._redis.stop)
        if self._control:
            self._control.close()
            control_path(self.run_dir).unlink(missing_ok=True)
            (self.run_dir / "cluster.json").unlink(missing_ok=True)

    async def _keep_redis(self, server: RedisServer) -> None:
        """Starts an embedded Redis again when it dies. Gateways wait for it, and its log has what they stored."""
        while True:
            await asyncio.sleep(REDIS_POLL_S)
            if server.dead:
                server.start()

    def _children(self) -> list[Child]:
        return self._gateways + [child for replicas in self._replicas.values() for _, child in replicas]

    async def _start_stage(self, model: str, entry: ModelEntry, stage: str) -> tuple[str, Child]:
        self._started += 1
        name = f"{stage}-{model}-{self._started}"
        port = free_port()
        parallel = {"dit": entry.parallel, "text_encoder": entry.text_parallel}
        table = {
            "service": {"port": port, "metrics_port": free_port(), "name": name, "max_in_flight": entry.max_in_flight},
            "model": {
                "name": model,
                "source": entry.source,
                "family": entry.family,
                "preset": entry.preset,
                "device": entry.device,
                "dtype": entry.dtype,
                "threads": entry.threads,
            },
            "engine": asdict(entry.engine),
            "features": entry.features if stage == "dit" else {},
            "parallel": asdict(parallel[stage]) if stage in parallel else {},
            "limits": entry.limits,
        }
        return f"127.0.0.1:{port}", await self._spawn(name, f"{stage}_svc", table)

    async def _start_gateway(self, index: int) -> None:
        entry = self.config.gateway
        assert self._redis
        table = {
            "gateway": {
                "host": entry.host,
                "http_port": entry.http_port if index == 0 else free_port(),
                "grpc_port": entry.grpc_port if index == 0 else free_port(),
                "public_url": entry.public_url,
            },
            "access": asdict(entry.access),
            "inputs": asdict(entry.inputs),
            "tls": asdict(entry.tls),
            "redis": {"url": self._redis.url},
            "store": {"path": str(self.run_dir / "artifacts"), **self.config.store},
            "stages": {stage: f"file:{self._address_file(stage)}" for stage in STAGES},
        }
        self._gateways.append(await self._spawn(f"gateway-{index}", "gateway", table))

    async def _spawn(self, name: str, module: str, table: dict[str, Any]) -> Child:
        path = self.run_dir / "config" / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        # The URL of Redis may hold a password.
        path.unlink(missing_ok=True)
        path.touch(0o600)
        write_toml(path, table)
        command = (sys.executable, "-m", module, "--config", str(path))
        child = Child(name, command, self.run_dir / "logs" / f"{name}.jsonl", environment_with_malloc())
        await child.start()
        return child

    def _address_file(self, stage: str) -> Path:
        return self.run_dir / "addresses" / stage

    def _write_addresses(self, stage: str) -> None:
        listed = [address for (_, s), replicas in self._replicas.items() if s == stage for address, _ in replicas]
        path = self._address_file(stage)
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(f"{address}\n" for address in listed))
        fresh.replace(path)

    async def _poll_health(self) -> None:
        gateway = self.config.gateway
        secure = _to_own_gateway(gateway.tls) if gateway.tls.on else None
        while True:
            status, body = await http_get(gateway.host, gateway.http_port, "/health", secure)
            ready = json.loads(body).get("models", {}) if status == 200 else {}
            if all(ready.get(model) for model in self.config.models):
                return
            await asyncio.sleep(POLL_S)

    async def _open_control(self) -> None:
        path = control_path(self.run_dir)
        if path.exists():
            try:
                _, writer = await asyncio.open_unix_connection(path)
            except ConnectionRefusedError:
                path.unlink()
            else:
                writer.close()
                raise StartupError(f"a cluster already runs in {self.run_dir}: stop it, or choose another --run-dir")
        self._control = await asyncio.start_unix_server(self._serve_control, path)

    async def _serve_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        if line:
            answer = await self._answer(json.loads(line))
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request.get("command") == "status":
            return {"processes": self.status()}
        models = [request["model"]] if request.get("model") else list(self.config.models)
        unknown = [model for model in models if model not in self.config.models]
        if unknown:
            return {"error": f"unknown model {unknown[0]!r}: there are {', '.join(self.config.models)}"}
        for stage, count in request.get("replicas", {}).items():
            await asyncio.gather(*(self.scale(model, stage, count) for model in models))
        return {"processes": self.status()}

    def _write_cluster_file(self) -> None:
        facts = {"http": self.http_address, "grpc": self.grpc_address}
        (self.run_dir / "cluster.json").write_text(json.dumps(facts))


def control_path(run_dir: Path) -> Path:
    """The control socket of a run folder."""
    return run_dir / "control.sock"


def ask(run_dir: Path, request: dict[str, Any]) -> dict[str, Any]:
    """One question to the cluster that runs in a folder.

    Raises:
        StartupError: none runs there, or it refused.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(control_path(run_dir)))
        except OSError as error:
            raise StartupError(f"no cluster runs in {run_dir}: start one with `lightloom up`") from error
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as stream:
            answer: dict[str, Any] = json.loads(stream.readline())
    if "error" in answer:
        raise StartupError(answer["error"])
    return answer


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _to_own_gateway(tls: TlsSection) -> ssl.SSLContext:
    """To a child of ours, whatever name is in its certificate; nothing secret is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # Until the gateway has said what is wrong with its certificate, there is none to show.
    with contextlib.suppress(OSError):
        context.load_cert_chain(tls.cert, tls.key)
    return context


async def http_get(host: str, port: int, path: str, secure: ssl.SSLContext | None = None) -> tuple[int, bytes]:
    """Status and body; (0, b"") while nothing listens."""
    try:
        reader, writer = await asyncio.open_connection(host, port, ssl=secure)
    except OSError:
        return 0, b""
    writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
    try:
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    except OSError:
        return 0, b""
    finally:
        writer.close()
    return (int(head.split()[1]) if head else 0), body
