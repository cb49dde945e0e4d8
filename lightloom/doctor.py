"""`lightloom doctor`: what this machine has, what a cluster needs, and what to do about the difference."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightloom.cluster_config import check_files, load_cluster
from lightloom.control import control_path
from lightloom.ports import try_port
from lightloom.redis_server import check_server, find_server
from services.config import environment
from services.errors import StartupError

PACKAGES = ("torch", "diffusers", "transformers", "grpcio", "protobuf", "redis", "fastapi", "numpy", "pillow", "av")
MIN_FREE_BYTES = 2 * 1024**3
REDIS_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: `level` is ok, note (works, with a limit) or bad (a cluster cannot run)."""

    subject: str
    level: str
    text: str


def examine(config: Path, run_dir: Path) -> list[Finding]:
    """All checks, in the order in which a start would meet them."""
    return [*_versions(), _device(), _config(config), *_ports(config, run_dir), _redis(), _disk(run_dir)]


def show(findings: list[Finding]) -> int:
    """Prints the findings; the exit code is 1 when one is bad."""
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[red]bad[/]"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        table.add_row(marks[finding.level], finding.subject, finding.text)
    Console().print(table)
    return int(any(finding.level == "bad" for finding in findings))


def _versions() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores")
    missing = []
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Finding("packages", "ok", ", ".join(found))
    if missing:
        yield Finding(
            "packages", "bad", f"missing: {', '.join(missing)} (run `make demo`, or pip install -r requirements.lock)"
        )


def _device() -> Finding:
    # nvidia-smi answers in milliseconds; importing torch for the same facts takes seconds.
    if not shutil.which("nvidia-smi"):
        return Finding("device", "note", "no NVIDIA GPU: models run on the CPU in float32")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    if result.returncode:
        return Finding("device", "bad", f"nvidia-smi fails: {result.stderr.strip() or result.stdout.strip()}")
    return Finding("device", "ok", "; ".join(result.stdout.strip().splitlines()))


def _config(config: Path) -> Finding:
    try:
        cluster = load_cluster(config)
        check_files(cluster)
    except StartupError as error:
        return Finding("config", "bad", str(error))
    return Finding("config", "ok", f"{config}: models {', '.join(cluster.models)}")


def _ports(config: Path, run_dir: Path) -> Iterator[Finding]:
    if control_path(run_dir).exists():
        yield Finding("ports", "note", f"a cluster runs in {run_dir} (or was killed there); ports not tried")
        return
    try:
        gateway = load_cluster(config).gateway
    except StartupError:
        return
    for name, port in (("HTTP", gateway.http_port), ("gRPC", gateway.grpc_port)):
        try:
            try_port(name, gateway.host, port)
        except StartupError as error:
            yield Finding("ports", "bad", str(error))
        else:
            yield Finding("ports", "ok", f"{name} port {gateway.host}:{port} is free")


def _redis() -> Finding:
    url = environment("REDIS_URL")
    if url:
        return _redis_policy(url)
    try:
        return Finding("redis", "ok", f"embedded: {find_server()}")
    except StartupError as error:
        return Finding("redis", "bad", str(error))


def _redis_policy(url: str) -> Finding:
    try:
        version = check_server("REDIS_URL", url, REDIS_TIMEOUT_S)
    except StartupError as error:
        return Finding("redis", "bad", str(error))
    return Finding("redis", "ok", f"REDIS_URL, version {version}, noeviction")


def _disk(run_dir: Path) -> Finding:
    folder = run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    free = f"{usage.free / 1024**3:.1f} GiB free at {run_dir}"
    return Finding("disk", "ok" if usage.free > MIN_FREE_BYTES else "bad", free)
