"""A cluster of recording stages, gateways and Redis as real processes, with everything that can be done to it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from lightloom.redis_server import RedisServer, start_redis
from services.free_port import free_port
from tests.cluster.redis_process import Sentinels
from tests.cluster.running import figures, wait_for
from tests.faults.history import History, Line, Recorder, read_lines
from tests.faults.processes import Process
from tests.faults.proxy import Network, Proxy

MODEL = "recording"
HELD = ("in_flight", "rank_jobs")
RESTART_EVERY_S = 0.1
READY_TIMEOUT_S = 90.0
# Two large pictures: a gateway with 64 MiB to grow in has them and what they need on their way.
HELD_BYTES = 32 * 1024 * 1024


class FaultCluster:
    """Use it as a context manager. `lease_s` is short, so that faults that last several leases do not take long.

    Args:
        replicas: processes a stage.
        gateway: changes to the gateways' section.
        modules: what to run instead of the usual modules, by process name.
        sentinels: servers that the gateways find through Sentinels, instead of a Redis of its own.
    """

    def __init__(
        self,
        folder: Path,
        replicas: Mapping[str, int],
        *,
        gateways: int = 2,
        gateway: Mapping[str, Any] | None = None,
        max_in_flight: int = 4,
        modules: Mapping[str, str] | None = None,
        sentinels: Sentinels | None = None,
    ) -> None:
        self.folder = folder
        self.lease_s = 2.0
        self.redis: RedisServer
        self.recorder = Recorder(folder / "records" / "faults.jsonl")
        self.processes: dict[str, Process] = {}
        self.proxies: dict[str, Proxy] = {}
        self._addresses: dict[str, str] = {}
        self.sentinels = sentinels
        self._redis_wanted = True
        self._redis_port = free_port()
        self._network = Network()
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor")
        self._make_stages(replicas, max_in_flight, modules or {})
        section = {"lease_s": self.lease_s, "checkpoint_every_s": 0.3, "max_attempts": 50, "max_queued": 100}
        section |= {"max_held_bytes": HELD_BYTES}
        self._make_gateways(gateways, section | dict(gateway or {}), modules or {})

    def _make_stages(self, replicas: Mapping[str, int], max_in_flight: int, modules: Mapping[str, str]) -> None:
        (self.folder / "records").mkdir(parents=True, exist_ok=True)
        for stage, count in replicas.items():
            for name in (f"{stage}-{index}" for index in range(count)):
                port = free_port()
                table = {
                    "service": {
                        "port": port,
                        "metrics_port": free_port(),
                        "name": name,
                        "max_in_flight": max_in_flight if stage == "dit" else 64,
                    },
                    "model": {"name": MODEL, "source": str(self.folder / "records"), "preset": stage, "threads": 1},
                }
                module = modules.get(name, "tests.faults.stage")
                self.processes[name] = Process(name, module, self.folder, table, self.recorder)
                self._addresses[name] = f"127.0.0.1:{port}"
            self._write_addresses(stage)

    def _make_gateways(self, count: int, section: Mapping[str, Any], modules: Mapping[str, str]) -> None:
        url = self.sentinels.sentinel_url if self.sentinels else f"redis://127.0.0.1:{self._redis_port}/0"
        stages = {name.rpartition("-")[0] for name in self._addresses}
        for name in (f"gateway-{index}" for index in range(count)):
            table = {
                "gateway": {"name": name, "http_port": free_port(), "grpc_port": free_port(), **section},
                "redis": {"url": url},
                "store": {"path": str(self.store)},
                "stages": {stage: f"file:{self.folder / stage}.addresses" for stage in stages},
            }
            self.processes[name] = Process(name, modules.get(name, "gateway"), self.folder, table, self.recorder)

    def __enter__(self) -> FaultCluster:
        if self.sentinels is None:
            self.redis = start_redis(self.folder / "redis", port=self._redis_port)
        else:
            self.redis = RedisServer(self.redis_url)
        self._supervisor.start()
        for process in self.processes.values():
            process.wanted = True
        try:
            self.until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.wanted = False
        self._redis_wanted = False
        time.sleep(2 * RESTART_EVERY_S)
        # Gateways first: they would take a stage that ends for a broken one.
        gateways = self.of("gateway")
        stages = [process for process in self.processes.values() if process not in gateways]
        for group in (gateways, stages):
            for process in group:
                process.end()
            for process in group:
                process.wait()
        self._stopping.set()
        self._supervisor.join()
        self.redis.stop()
        self._network.close()
        left = self.orphans()
        assert not left, f"processes that outlived their cluster: {left}"

    @property
    def store(self) -> Path:
        """The artifact store."""
        return self.folder / "store"

    @property
    def redis_url(self) -> str:
        """Of the server that holds the state now."""
        return f"redis://127.0.0.1:{self.sentinels.primary.port if self.sentinels else self._redis_port}/0"

    @property
    def urls(self) -> list[str]:
        """Of the gateways' REST fronts."""
        return [f"http://127.0.0.1:{gateway.table['gateway']['http_port']}" for gateway in self.of("gateway")]

    @property
    def grpc_target(self) -> str:
        """Of the gateways' gRPC fronts, all in one."""
        return "ipv4:" + ",".join(
            f"127.0.0.1:{gateway.table['gateway']['grpc_port']}" for gateway in self.of("gateway")
        )

    def of(self, stage: str) -> list[Process]:
        """The processes of a stage, or the gateways."""
        return [process for name, process in self.processes.items() if name.rpartition("-")[0] == stage]

    def until_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Waits until every gateway has seen every replica healthy, and knows of no other."""
        wait_for(lambda: all(self._sees_all(url) for url in self.urls), timeout_s, 0.1)

    def _sees_all(self, url: str) -> bool:
        with contextlib.suppress(httpx.HTTPError, IndexError, KeyError):
            if httpx.get(f"{url}/health").status_code == 200:
                [model] = httpx.get(f"{url}/v1/models").json()["data"]
                healthy = {replica["address"] for replica in model["replicas"] if replica["healthy"]}
                return healthy == set(self._addresses.values())
        return False

    def _supervise(self) -> None:
        # In this thread alone: processes end with the thread that starts them.
        while not self._stopping.wait(RESTART_EVERY_S):
            for process in self.processes.values():
                if process.wanted and process.ended:
                    process.start()
            if self._redis_wanted and self.redis.dead:
                self.redis.start()
                self.recorder.write("start", name="redis", pid=0)

    def reconfigure(self, stage: str, section: str, **values: Any) -> None:
        """Starts a stage's processes, or the gateways, again with these values."""
        for process in self.of(stage):
            process.table[section] |= values
            process.restart()
        self.until_ready()

    def kill_redis(self) -> None:
        """SIGKILL. It stays away until `revive_redis`."""
        assert self.redis.process is not None
        self._redis_wanted = False
        self.recorder.write("fault", what="kill", name="redis", pid=self.redis.process.pid)
        self.redis.process.kill()
        self.redis.process.wait()

    def kill_primary(self) -> None:
        """SIGKILL to the primary that the Sentinels name. It stays dead."""
        assert self.sentinels is not None
        process = self.sentinels.primary.process
        self.recorder.write("fault", what="kill", name="primary", pid=process.pid)
        process.kill()
        process.wait()

    def revive_redis(self) -> None:
        """The supervisor starts it again, on its port and with its log."""
        self._redis_wanted = True

    @contextlib.contextmanager
    def behind_proxy(self, name: str) -> Iterator[Proxy]:
        """Gateways reach a stage process through a proxy, for the length of the block."""
        direct, stage = self._addresses[name], name.rpartition("-")[0]

        def note(what: str, directions: list[str]) -> None:
            self.recorder.write("fault", what=what, name=name, directions=directions)

        proxy = self.proxies[name] = Proxy(self._network, direct, note)
        self._move(name, stage, proxy.address)
        try:
            yield proxy
        finally:
            self._move(name, stage, direct)
            del self.proxies[name]
            proxy.close()

    def _move(self, name: str, stage: str, address: str) -> None:
        self._addresses[name] = address
        self._write_addresses(stage)
        self.until_ready()

    def _write_addresses(self, stage: str) -> None:
        path = self.folder / f"{stage}.addresses"
        fresh = path.with_suffix(".new")
        listed = [address for name, address in self._addresses.items() if name.rpartition("-")[0] == stage]
        fresh.write_text("".join(f"{address}\n" for address in listed))
        fresh.replace(path)

    def held(self) -> list[str]:
        """What requests hold in stages and store now. Empty when all is well."""
        held = []
        for process in self.processes.values():
            if port := process.table.get("service", {}).get("metrics_port"):
                try:
                    now = figures(port)
                except httpx.HTTPError:
                    held.append(f"{process.name} does not answer")
                    continue
                held += [f"{process.name}: {kind} {now[kind]:.0f}" for kind in HELD if now.get(kind)]
        folders = [path for path in self.store.iterdir() if path.name != "artifacts"] if self.store.exists() else []
        files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
        return held + [str(path.relative_to(self.store)) for path in (*files, *self.store.rglob("*.part"))]

    def orphans(self) -> list[str]:
        """Processes of this cluster that no process of `processes` stands for."""
        known = {member.pid for process in self.processes.values() for member in process.family()}
        known |= {self.redis.process.pid} if self.redis.process else set()
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            command = process.info["cmdline"] or ()
            ours = any(str(self.folder) in part for part in command) and set(command) & {"--config", "--channel-fd"}
            if ours and process.info["pid"] not in known:
                found.append(f"{process.info['pid']}: {' '.join(process.info['cmdline'])[:200]}")
        return found

    def history(self, clients: Path, final: Line) -> History:
        """All records so far, with those of one file of clients."""
        workers = [path for path in (self.folder / "records").glob("*.jsonl") if path.name != "faults.jsonl"]
        faults = read_lines([self.folder / "records" / "faults.jsonl"])
        return History(read_lines([clients]), faults, read_lines(workers), final)
