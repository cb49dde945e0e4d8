"""What a user imports: `Client`, `AsyncClient`, and `Local` for use without a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightloom.client import AsyncClient, Client
    from lightloom.local import Local

__all__ = ["AsyncClient", "Client", "Local"]


def __getattr__(name: str) -> Any:
    # Imported when first used: a client needs no torch, and `lightloom --help` needs neither.
    if name in ("Client", "AsyncClient"):
        from lightloom import client

        return getattr(client, name)
    if name == "Local":
        from lightloom.local import Local

        return Local
    raise AttributeError(f"module 'lightloom' has no attribute {name!r}")
