"""Where the store keeps its bytes: named objects in a folder, or in a bucket (`objects_s3.py`).

An object is whole or not there, and never changes in part. Calls block: the store makes them in threads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.errors import ArtifactStoreDown, ArtifactStoreFull, ServiceError, StartupError

# EFBIG: the process may write no file of that size (RLIMIT_FSIZE).
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RETRY_AFTER_S = 10.0
KINDS = ("artifacts", "latents", "probes")

Pieces = Sequence[bytes | bytearray]


@dataclass(frozen=True, slots=True)
class Stored:
    """An object in a listing."""

    name: str
    nbytes: int
    modified_unix_s: float


class Objects(Protocol):
    """What a folder and a bucket can do. Names are `KIND/FILE`. All raise ArtifactStoreDown when they cannot."""

    def write(self, objects: Mapping[str, Pieces], *, durable: bool) -> None:
        """Writes objects, one after the other; when it fails, none of them is there.

        Args:
            durable: they must survive a loss of power.

        Raises:
            ArtifactStoreFull: there is no room for them.
        """

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """An object's bytes, or those of a range; fewer, where it ends before.

        Raises:
            FileNotFoundError: there is no such object.
        """

    def delete(self, names: Sequence[str]) -> None:
        """Removes objects, those that are there."""

    def listed(self, prefix: str) -> Iterator[Stored]:
        """The objects whose names begin so, with what writers that died left unfinished."""


class Folder:
    """A folder, on a disk or shared over a network."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._syncs = ThreadPoolExecutor(2, "sync")
        try:
            for kind in KINDS:
                (root / kind).mkdir(parents=True, exist_ok=True)
            probe = _part_of(root / "probes/start")
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise StartupError(f"the artifact store {root} cannot be written: {error.strerror}") from error

    def write(self, objects: Mapping[str, Pieces], *, durable: bool) -> None:
        """As Objects.write: under other names first, renamed when all are whole."""
        paths = [self._root / name for name in objects]
        mine = [_part_of(path) for path in paths]
        try:
            for part, pieces in zip(mine, objects.values(), strict=True):
                with part.open("wb") as file:
                    file.writelines(pieces)
            # At once, each in a thread: the file system commits them together.
            if durable:
                list(self._syncs.map(lambda part: _sync(part, os.fdatasync), mine))
            for number, path in enumerate(paths):
                mine[number].replace(path)
                mine[number] = path
            if durable:
                # A file is under its new name after a crash only once its folder is synced.
                for folder in {path.parent for path in paths}:
                    _sync(folder, os.fsync)
        except OSError as error:
            for path in mine:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            raise _refusal(error) from error

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """As Objects.read."""
        try:
            with (self._root / name).open("rb") as file:
                file.seek(start)
                return file.read(-1 if stop is None else stop - start)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ArtifactStoreDown(f"the artifact store cannot be read: {error.strerror}") from error

    def delete(self, names: Sequence[str]) -> None:
        """As Objects.delete."""
        try:
            for name in names:
                (self._root / name).unlink(missing_ok=True)
        except OSError as error:
            raise ArtifactStoreDown(f"the artifact store cannot be written: {error.strerror}") from error

    def listed(self, prefix: str) -> Iterator[Stored]:
        """As Objects.listed. It looks through the whole folder of the kind."""
        kind, _, start = prefix.partition("/")
        try:
            with os.scandir(self._root / kind) as entries:
                for entry in entries:
                    # An unfinished one has a dot before its name.
                    if not entry.name.removeprefix(".").startswith(start):
                        continue
                    # It may have gone since.
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat()
                        yield Stored(f"{kind}/{entry.name}", found.st_size, found.st_mtime)
        except OSError as error:
            raise ArtifactStoreDown(f"the artifact store cannot be read: {error.strerror}") from error


def _refusal(error: OSError) -> ServiceError:
    if error.errno in _FULL:
        return ArtifactStoreFull("the artifact store is full: try again later", retry_after_s=RETRY_AFTER_S)
    message = f"the artifact store cannot be written: {error.strerror}"
    return ArtifactStoreDown(message, retry_after_s=RETRY_AFTER_S)


def _part_of(path: Path) -> Path:
    # Not by process number: in containers every gateway has the same one.
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


def _sync(path: Path, sync: Callable[[int], None]) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        sync(opened)
    finally:
        os.close(opened)
