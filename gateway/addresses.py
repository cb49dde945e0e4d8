"""What a target of a stage names: addresses, as lists in a file or a config say them, or DNS."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path


async def addresses_of(target: str) -> list[str]:
    """The addresses a `static:`, `dns:///` or `file:` target names now."""
    kind, _, rest = target.partition(":")
    if kind == "static":
        return [address.strip() for address in rest.split(",") if address.strip()]
    if kind == "file":
        return _read_list(Path(rest))
    if kind == "dns":
        host, _, port = rest.removeprefix("///").rpartition(":")
        found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        hosts = {str(info[4][0]) for info in found}
        return sorted(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts)
    return []


def _read_list(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []
