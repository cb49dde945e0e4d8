"""The cluster on one machine: Redis, stage services and gateway as child processes.

`lightloom up` runs a `Cluster` until Ctrl-C; `make demo` runs one around a single picture. State lives in a run
folder: configs, logs, artifacts, Redis data, the address lists that the gateway follows, and a control socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from lightloom.child import Child, first_failure
from lightloom.cluster_config import INTERPOLATION, STAGES, ClusterConfig, check_stage, stage_table, write_toml
from lightloom.control import ControlServer
from lightloom.member import Member, ProcessRow, find_ranks
from lightloom.ports import address_of, try_port
from lightloom.redis_server import RedisServer, start_redis
from services.config import TlsSection, environment_with_malloc
from services.errors import StartupError
from services.free_port import free_port
from services.parallel.degrees import Degrees

POLL_S = 0.1
# After so long a gateway has asked every process that serves what it is, twice.
HEARD_OF_S = 5.0
REDIS_POLL_S = 0.5
# Longer than a gateway takes to notice that an address left its list.
LEAVE_S = 2.5
STOP_GRACE_S = 10.0
# No other gateway comes after these, and who stops the cluster does not want to wait.
DRAIN_S = 2.0


class Cluster:
    """Starts, scales and stops the processes.

    As an async context manager it starts them all at once and stops them at the end; who has something to check
    between, calls `open`, `start` and, in any case, `stop`.
    """

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
        self.ready = False
        self._gateways: list[Member] = []
        self._replicas: dict[tuple[str, str], list[Member]] = {}
        self._redis: RedisServer | None = None
        self._redis_watch: asyncio.Task[None] | None = None
        self._started = 0
        self._control = ControlServer(self.run_dir, self._answer)

    @property
    def http_address(self) -> str:
        """host:port of the first gateway's REST front, as clients on this machine call it."""
        return address_of(self.config.gateway.host, self.config.gateway.http_port)

    @property
    def grpc_address(self) -> str:
        """host:port of the first gateway's gRPC front, as clients on this machine call it."""
        return address_of(self.config.gateway.host, self.config.gateway.grpc_port)

    async def __aenter__(self) -> Cluster:
        try:
            await self.open()
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def open(self) -> None:
        """Takes the run folder; from now on, commands are told that the cluster starts. Nothing is started yet.

        Raises:
            StartupError: another cluster uses the folder, or a port cannot be had.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        await self._control.open()
        gateway = self.config.gateway
        for name, port in (("HTTP", gateway.http_port), ("gRPC", gateway.grpc_port)):
            try_port(name, gateway.host, port)

    async def start(self) -> None:
        """Starts everything, once it is open; returns when the processes run (see `wait_ready`).

        Raises:
            StartupError: Redis or a port cannot be had.
        """
        # In this thread, although it waits: the server ends with the thread that starts it, and nothing else runs yet.
        self._redis = start_redis(self.run_dir / "redis", self.config.redis_url)
        self._redis_watch = asyncio.create_task(self._keep_redis(self._redis), name="watch redis")
        for stage in (*STAGES, INTERPOLATION):
            self._address_file(stage).parent.mkdir(exist_ok=True)
            self._address_file(stage).write_text("")
        for model, entry in self.config.models.items():
            # `up --replicas` counts for every model, and for the interpolator, which is of none.
            counts = {**entry.stages, **entry.replicas}
            counts.pop(INTERPOLATION, None)
            for stage, count in counts.items():
                await self.scale(model, stage, count)
        if self.config.interpolation is not None:
            await self.scale("", INTERPOLATION, self.config.interpolation.replicas)
        for index in range(self.config.gateway.replicas):
            await self._start_gateway(index)

    async def wait_ready(self, timeout_s: float = 1800.0) -> None:
        """Waits until every model has all its stages; until then, commands are told that the cluster starts.

        Raises:
            StartupError: a process gave up, or the time is over.
        """
        failure = asyncio.create_task(first_failure(self._children()))
        ready = asyncio.create_task(self._until_models_are_ready())
        done, pending = await asyncio.wait({failure, ready}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if not done:
            raise StartupError(f"not ready after {timeout_s:.0f} s: see {self.run_dir / 'logs'}")
        done.pop().result()
        self.ready = True

    async def wait_failure(self) -> None:
        """Waits until a process gives up for good, then raises StartupError with its reason."""
        await first_failure(self._children())

    async def scale(self, model: str, stage: str, count: int) -> None:
        """Brings a stage of a model to `count` replicas; those that leave finish their work first.

        The interpolator is a stage of the model "", denoisers of one expert are `dit.EXPERT`.

        Raises:
            StartupError: the model has no such stage.
        """
        if model:
            check_stage(model, self.config.models[model], stage)
        replicas = self._replicas.setdefault((model, stage), [])
        for _ in range(count - len(replicas)):
            replicas.append(await self._start_stage(model, stage))
        leaving = replicas[count:]
        del replicas[count:]
        self._write_addresses(stage.partition(".")[0])
        if leaving:
            await asyncio.sleep(LEAVE_S)
            await asyncio.gather(*(member.child.stop(60.0) for member in leaving))

    async def look(self) -> list[ProcessRow]:
        """Asks every process how it is, and returns `status`."""
        await asyncio.gather(*(member.look() for member in self._members()))
        return self.status()

    def status(self) -> list[ProcessRow]:
        """One row a process, as the last look found it; a Redis that is not ours has none."""
        rows = [member.row() for member in self._members()]
        return [*rows, self._redis.row()] if self._redis and self._redis.process else rows

    async def stop(self) -> None:
        """Stops gateways, then stages, then Redis. No process is left."""
        await asyncio.gather(*(member.child.stop(STOP_GRACE_S) for member in self._gateways))
        await asyncio.gather(*(member.child.stop(STOP_GRACE_S) for member in self._members()))
        if self._redis and self._redis_watch:
            self._redis_watch.cancel()
            await asyncio.to_thread(self._redis.stop)
        self._control.close()

    async def _keep_redis(self, server: RedisServer) -> None:
        """Starts an embedded Redis again when it dies. Gateways wait for it, and its log has what they stored."""
        while True:
            await asyncio.sleep(REDIS_POLL_S)
            if server.dead:
                server.start()
                server.restarts += 1

    def _members(self) -> list[Member]:
        return [member for replicas in self._replicas.values() for member in replicas] + self._gateways

    def _children(self) -> list[Child]:
        return [member.child for member in self._members()]

    async def _start_stage(self, model: str, kind: str) -> Member:
        stage, _, expert = kind.partition(".")
        self._started += 1
        name = "-".join(filter(None, (stage, model, expert, str(self._started))))
        port, metrics_port = free_port(), free_port()
        table = stage_table(self.config, model, kind)
        table["service"] |= {"port": port, "metrics_port": metrics_port, "name": name}
        child = await self._spawn(name, f"{stage}_svc", table)
        of_model = self.config.models.get(model)
        degrees = Degrees.of(of_model.parallel_of(kind)) if of_model else Degrees()
        return Member(child, f"127.0.0.1:{port}", "127.0.0.1", metrics_port, degrees=degrees)

    async def _start_gateway(self, index: int) -> None:
        entry = self.config.gateway
        assert self._redis
        http_port = entry.http_port if index == 0 else free_port()
        grpc_port = entry.grpc_port if index == 0 else free_port()
        table = {
            "gateway": {
                "host": entry.host,
                "http_port": http_port,
                "grpc_port": grpc_port,
                "drain_s": DRAIN_S,
                "public_url": entry.public_url,
            },
            "access": asdict(entry.access),
            "inputs": asdict(entry.inputs),
            "tls": asdict(entry.tls),
            "redis": {"url": self._redis.url},
            "store": {"path": str(self.run_dir / "artifacts"), **self.config.store},
            "stages": {stage: f"file:{self._address_file(stage)}" for stage in (*STAGES, INTERPOLATION)},
        }
        child = await self._spawn(f"gateway-{index}", "gateway", table)
        secure = _to_own_gateway(entry.tls) if entry.tls.on else None
        address = address_of(entry.host, grpc_port)
        self._gateways.append(Member(child, address, entry.host, http_port, "/health", secure))

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
        of_stage = (replicas for (_, name), replicas in self._replicas.items() if name.partition(".")[0] == stage)
        listed = [member.address for replicas in of_stage for member in replicas]
        path = self._address_file(stage)
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(f"{address}\n" for address in listed))
        fresh.replace(path)

    async def _until_models_are_ready(self) -> None:
        serving_since_s = time.monotonic()
        while True:
            page = await self._gateways[0].look()
            health: dict[str, Any] = json.loads(page) if page else {"redis": False}
            models_are = health["redis"] and all(health["models"].get(model) for model in self.config.models)
            interpolation = self.config.interpolation
            if models_are and (interpolation is None or not interpolation.replicas or health["interpolation"]):
                return
            missing = health.get("missing_experts", {})
            if not missing or any(row["state"] != "serving" for row in await self.look()):
                serving_since_s = time.monotonic()
            elif time.monotonic() - serving_since_s > HEARD_OF_S:
                raise _lacks(missing)
            await asyncio.sleep(POLL_S)

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request.get("command") == "scale":
            models = [request["model"]] if request["model"] else list(self.config.models)
            unknown = [model for model in models if model not in self.config.models]
            if unknown:
                return {"error": f"unknown model {unknown[0]!r}: there are {', '.join(self.config.models)}"}
            if INTERPOLATION in request["replicas"] and self.config.interpolation is None:
                return {"error": "the cluster has no interpolation: its config has no such section"}
            try:
                for stage, count in request["replicas"].items():
                    served = [""] if stage == INTERPOLATION else models
                    await asyncio.gather(*(self.scale(model, stage, count) for model in served))
            except StartupError as error:
                return {"error": str(error)}
        rows = await self.look()
        for row in rows:
            row["rank_pids"] = find_ranks(row["pid"]) if row["ranks"] else []
        return {"processes": rows, "ready": self.ready, "grpc": self.grpc_address}


def _to_own_gateway(tls: TlsSection) -> ssl.SSLContext:
    """To a child of ours, whatever name is in its certificate; nothing secret is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # Until the gateway has said what is wrong with its certificate, there is none to show.
    with contextlib.suppress(OSError):
        context.load_cert_chain(tls.cert, tls.key)
    return context


def _lacks(missing: dict[str, list[str]]) -> StartupError:
    [(model, experts), *_] = missing.items()
    return StartupError(
        f"no denoiser of model {model!r} holds {' or '.join(experts)}: give it"
        f" [models.{model}.experts.{experts[0]}] with 1 replica at least"
    )
