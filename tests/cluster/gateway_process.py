"""A gateway of its own as a real process, beside those of the cluster, for tests of what can happen to one."""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from lightloom.cluster_config import write_toml
from services.config import environment_with_malloc
from services.free_port import free_port
from tests.cluster.running import wait_for

ROOT = Path(__file__).resolve().parents[2]


class GatewayProcess:
    """The process, its log, and a REST client.

    Args:
        settings: what to add to its config, by section.
        environment: what to add to its environment.
        verify: what the client trusts, when the sections make it TLS.
    """

    def __init__(
        self,
        folder: Path,
        redis_url: str,
        stages: Mapping[str, str],
        settings: Mapping[str, Mapping[str, object]] | None = None,
        environment: Mapping[str, str] | None = None,
        verify: ssl.SSLContext | bool = False,
    ) -> None:
        self.http_port, self.grpc_port = free_port(), free_port()
        self.log = folder / "gateway.log"
        self.store = folder / "store"
        config = folder / "gateway.toml"
        table: dict[str, dict[str, object]] = {
            "gateway": {"http_port": self.http_port, "grpc_port": self.grpc_port, "lease_s": 2.0, "drain_s": 2.0},
            "redis": {"url": redis_url},
            "store": {"path": str(self.store)},
            "stages": {stage: f"static:{address}" for stage, address in stages.items()},
        }
        for section, values in (settings or {}).items():
            table[section] = {**table.get(section, {}), **values}
        folder.mkdir(exist_ok=True)
        write_toml(config, table)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "--config", str(config)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=environment_with_malloc() | dict(environment or {}),
            )
        scheme = "https" if "tls" in table else "http"
        self.rest = httpx.Client(base_url=f"{scheme}://127.0.0.1:{self.http_port}", timeout=60, verify=verify)

    def health(self) -> int:
        """Status of /health; 0 while nobody listens."""
        try:
            return self.rest.get("/health").status_code
        except httpx.TransportError:
            return 0

    def ended(self) -> int:
        """The exit code of one that ends by itself."""
        self.rest.close()
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.rest.close()
        self.process.terminate()
        return self.process.wait(20)


@contextmanager
def gateway(
    folder: Path, redis_url: str, stages: Mapping[str, str], ready: int = 200, **options: Any
) -> Iterator[GatewayProcess]:
    """A gateway whose /health has answered `ready`; options as GatewayProcess."""
    running = GatewayProcess(folder, redis_url, stages, **options)
    try:
        wait_for(lambda: running.health() == ready, 60)
        yield running
    finally:
        assert running.stop() == 0, running.log.read_text()
