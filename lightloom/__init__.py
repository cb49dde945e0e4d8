"""What a user imports: `Client`, `AsyncClient`, `Local` for use without a cluster, and `Media` for their inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightloom.client import AsyncClient, Client
    from lightloom.local import Local
    from services.request import Media

__all__ = ["AsyncClient", "Client", "Local", "Media"]


def __getattr__(name: str) -> Any:
    # Imported when first used: a client needs no torch, and `lightloom --help` needs neither.
    if name in ("Client", "AsyncClient"):
        from lightloom import client

        return getattr(client, name)
    if name == "Local":
        from lightloom.local import Local

        return Local
    if name == "Media":
        from services.request import Media

        return Media
    raise AttributeError(f"module 'lightloom' has no attribute {name!r}")
