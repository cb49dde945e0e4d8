"""The artifact store: a folder that all gateways share. Files are whole before anyone hears of them."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import secrets
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from protos import gateway_pb2
from services.errors import CorruptTensor, Overloaded, StartupError

_LENGTH = struct.Struct("<I")
# Artifacts written lately are kept in memory too, up to so much: mostly somebody waits for them.
RECENT_BYTES = 32 * 1024 * 1024


class Store:
    """Artifacts by file name (`artifact_name`), and latents between two stages by request id."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._recent: OrderedDict[str, bytes] = OrderedDict()
        self._recent_bytes = 0
        try:
            for name in ("artifacts", "latents"):
                (root / name).mkdir(parents=True, exist_ok=True)
            probe = _part_of(root / "probe")
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise StartupError(f"the artifact store {root} cannot be written: {error.strerror}") from error

    async def put(self, name: str, data: bytes, artifact: gateway_pb2.Artifact) -> None:
        """Writes an artifact and its manifest, and syncs both; sets `nbytes` and `sha256`.

        Raises:
            Overloaded: the disk is full.
        """
        await _to_its_end(self._write, name, data, artifact)
        self._remember(artifact.sha256, data)

    def _write(self, name: str, data: bytes, artifact: gateway_pb2.Artifact) -> None:
        artifact.nbytes = len(data)
        artifact.sha256 = hashlib.sha256(data).hexdigest()
        manifest = {"mime": artifact.mime, "nbytes": artifact.nbytes, "sha256": artifact.sha256}
        path = self.path(name)
        try:
            _write_synced(path, data)
            _write_synced(_manifest_of(path), json.dumps(manifest).encode())
            _sync_names(path.parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Overloaded("the artifact store is full: try again later", retry_after_s=30.0) from error
            raise

    def _remember(self, sha256: str, data: bytes) -> None:
        self._recent_bytes += len(data) - len(self._recent.pop(sha256, b""))
        self._recent[sha256] = data
        while self._recent_bytes > RECENT_BYTES:
            _, oldest = self._recent.popitem(last=False)
            self._recent_bytes -= len(oldest)

    def recent(self, artifact: gateway_pb2.Artifact) -> bytes | None:
        """An artifact's bytes, if this process wrote them lately."""
        return self._recent.get(artifact.sha256)

    def path(self, name: str) -> Path:
        """Where an artifact's bytes are, or would be."""
        return self._root / "artifacts" / name

    async def files_of(self, request_id: str) -> list[str]:
        """Names of the artifacts that owners of a request have written so far. It looks through the whole folder."""
        folder = self._root / "artifacts"
        paths = await asyncio.to_thread(lambda: list(folder.glob(f"{request_id}.*")))
        return [path.name for path in paths if path.suffix != ".json"]

    async def checkpoints_of(self, request_id: str) -> list[str]:
        """Names of the checkpoints that owners of a request have written and nobody has dropped."""
        folder = self._root / "latents"
        paths = await asyncio.to_thread(lambda: list(folder.glob(f"{request_id}.*")))
        return [path.name for path in paths]

    def drop(self, name: str) -> None:
        """Forgets an artifact, if it is there."""
        path = self.path(name)
        path.unlink(missing_ok=True)
        _manifest_of(path).unlink(missing_ok=True)

    async def put_latents(self, request_id: str, messages: Iterable[bytes]) -> None:
        """Keeps a relayed bundle for the next stage. It is not synced: lost latents are computed again."""
        await _to_its_end(self._write_latents, request_id, list(messages))

    def _write_latents(self, request_id: str, messages: list[bytes]) -> None:
        path = self._latents(request_id)
        fresh = _part_of(path)
        with fresh.open("wb") as file:
            for message in messages:
                file.write(_LENGTH.pack(len(message)) + message)
        fresh.replace(path)

    async def latents(self, request_id: str) -> list[bytes]:
        """The kept messages.

        Raises:
            CorruptTensor: they are gone or cut short.
        """
        try:
            data = await asyncio.to_thread(self._latents(request_id).read_bytes)
        except OSError as error:
            raise CorruptTensor("the latents of the request are gone") from error
        messages, start = [], 0
        while start < len(data):
            (length,) = _LENGTH.unpack_from(data, start)
            start += _LENGTH.size
            if start + length > len(data):
                raise CorruptTensor("the latents of the request are cut short")
            messages.append(data[start : start + length])
            start += length
        return messages

    def drop_latents(self, request_id: str) -> None:
        """Forgets them."""
        self._latents(request_id).unlink(missing_ok=True)

    def _latents(self, request_id: str) -> Path:
        return self._root / "latents" / request_id


def artifact_name(request_id: str, fence: int) -> str:
    """The file of one owner of a request: one that has lost it cannot touch another's."""
    return f"{request_id}.{fence}"


def _manifest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _part_of(path: Path) -> Path:
    # Not by process number: in containers every gateway has the same one.
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


async def _to_its_end(write: Callable[..., None], *arguments: Any) -> None:
    """Runs in a thread. Who is cancelled meanwhile waits all the same: nothing must be written after the clean-up."""
    writing = asyncio.ensure_future(asyncio.to_thread(write, *arguments))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.gather(writing, return_exceptions=True)
        raise


def _write_synced(path: Path, data: bytes) -> None:
    fresh = _part_of(path)
    try:
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fdatasync(file.fileno())
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def _sync_names(folder: Path) -> None:
    """A file that was renamed is under its new name after a crash only once its folder is synced."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
