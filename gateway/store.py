"""The artifact store that all gateways share: artifacts with their manifests, and latents between two stages.

What is read is checked against its manifest before anyone gets it. Used by the lifecycle, the service and the sweep;
`objects.py` and `objects_s3.py` know where the bytes are.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import struct
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from gateway.config import StoreSection
from gateway.digests import CHUNK_BYTES, Digests
from gateway.objects import Folder, Objects, Pieces, Stored
from gateway.objects_s3 import Bucket
from gateway.store_writes import StoreWrites
from protos import gateway_pb2
from services.errors import CorruptArtifact, CorruptTensor, ServiceError, WrongState

log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
# Artifacts written lately are kept in memory too, up to so much: mostly somebody waits for them.
RECENT_BYTES = 32 * 1024 * 1024
LISTED_AT_ONCE = 1000
THREADS = 16
T = TypeVar("T")


class Store:
    """Artifacts by file name (`artifact_name`), latents by request id."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        # Its own threads: a bucket that does not answer must not hold up what else the gateway does in threads.
        self._threads = ThreadPoolExecutor(THREADS, "store")
        self.writes = StoreWrites(objects, self._threads)
        self._recent: OrderedDict[str, bytes] = OrderedDict()
        self._recent_bytes = 0

    async def put(
        self,
        name: str,
        data: bytes | bytearray,
        artifact: gateway_pb2.Artifact,
        until_s: float,
        digests: Digests | None = None,
    ) -> None:
        """Writes an artifact and its manifest; sets `nbytes` and `sha256`. Waits for a store that is full or away.

        Args:
            digests: of the data, where they have been made beside its coming.

        Raises:
            ArtifactStoreFull, ArtifactStoreDown: it was so until then.
        """

        def objects() -> Mapping[str, Pieces]:
            artifact.nbytes = len(data)
            artifact.sha256, chunks = (digests or Digests.of(data)).ended()
            return {f"artifacts/{name}": [data], f"artifacts/{name}.json": [manifest_of(name, artifact, chunks)]}

        await self.writes.write(objects, len(data), durable=True, until_s=until_s)
        self._remember(artifact.sha256, data)

    def _remember(self, sha256: str, data: bytes | bytearray) -> None:
        if len(data) > RECENT_BYTES:
            return
        data = bytes(data)
        self._recent_bytes += len(data) - len(self._recent.pop(sha256, b""))
        self._recent[sha256] = data
        while self._recent_bytes > RECENT_BYTES:
            _, oldest = self._recent.popitem(last=False)
            self._recent_bytes -= len(oldest)

    def recent(self, artifact: gateway_pb2.Artifact) -> bytes | None:
        """An artifact's bytes, if this process wrote them lately."""
        return self._recent.get(artifact.sha256)

    async def read(self, name: str, artifact: gateway_pb2.Artifact, start: int, stop: int) -> AsyncIterator[bytes]:
        """An artifact's bytes from `start` to `stop`, in pieces; each is checked before it is given.

        Raises:
            WrongState: it is gone.
            CorruptArtifact: it is not what was written.
            ArtifactStoreDown: the store does not answer.
        """
        recent = self.recent(artifact)
        if recent is not None:
            yield recent[start:stop]
            return
        chunks = await self._in_thread(self._read_manifest, name, artifact)
        numbers = range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES))
        ahead: asyncio.Future[bytes] | None = None
        try:
            for number in numbers:
                chunk = await (ahead or self._chunk(name, artifact, number, chunks))
                # Read and checked while this one is sent.
                ahead = self._chunk(name, artifact, number + 1, chunks) if number + 1 in numbers else None
                begin = number * CHUNK_BYTES
                yield chunk[max(0, start - begin) : stop - begin]
        finally:
            if ahead is not None and not ahead.cancel() and not ahead.cancelled():
                # Seen, even where nobody asks for that chunk any more.
                ahead.exception()

    def _chunk(
        self, name: str, artifact: gateway_pb2.Artifact, number: int, chunks: Sequence[str]
    ) -> asyncio.Future[bytes]:
        begin = number * CHUNK_BYTES
        return asyncio.ensure_future(self._in_thread(self._read_chunk, name, artifact, begin, chunks[number]))

    def _read_manifest(self, name: str, artifact: gateway_pb2.Artifact) -> list[str]:
        """The digests of the chunks."""
        with _gone():
            text = self._objects.read(f"artifacts/{name}.json")
        try:
            manifest = json.loads(text)
            told = manifest["sha256"], manifest["nbytes"], manifest["chunk_bytes"], len(manifest["chunks"])
            chunks = [str(digest) for digest in manifest["chunks"]]
        except (ValueError, KeyError, TypeError) as error:
            raise _corrupt(name, "its manifest cannot be read") from error
        if told != (artifact.sha256, artifact.nbytes, CHUNK_BYTES, -(-artifact.nbytes // CHUNK_BYTES)):
            raise _corrupt(name, "its manifest is of another one")
        return chunks

    def _read_chunk(self, name: str, artifact: gateway_pb2.Artifact, begin: int, digest: str) -> bytes:
        end = min(begin + CHUNK_BYTES, artifact.nbytes)
        with _gone():
            # One byte more than there should be: an artifact that has grown is as wrong as one that was cut.
            data = self._objects.read(f"artifacts/{name}", begin, end + (end == artifact.nbytes))
        if len(data) != end - begin:
            raise _corrupt(name, f"it has not the {artifact.nbytes} bytes that were written")
        if hashlib.sha256(data).hexdigest() != digest:
            raise _corrupt(name, f"bytes {begin} to {end} are not those that were written")
        return data

    async def drop(self, *names: str) -> None:
        """Forgets artifacts, those that are there. What cannot be removed now is left to the sweep."""
        await self._drop([f"artifacts/{name}{suffix}" for name in names for suffix in ("", ".json")])

    async def put_latents(self, request_id: str, messages: Iterable[bytes], until_s: float) -> None:
        """Keeps a relayed bundle for the next stage, as `put`. It is not synced: lost latents are computed again."""
        pieces = [part for message in messages for part in (_LENGTH.pack(len(message)), message)]
        nbytes = sum(map(len, pieces))
        objects = {f"latents/{request_id}": pieces}
        await self.writes.write(lambda: objects, nbytes, durable=False, until_s=until_s)

    async def latents(self, request_id: str) -> list[bytes]:
        """The kept messages.

        Raises:
            CorruptTensor: they are gone or cut short.
            ArtifactStoreDown: the store does not answer.
        """
        messages: list[bytes] = []
        rest, start, whole = b"", 0, False
        while not whole:
            chunk = await self._in_thread(self._read_latents, request_id, start)
            rest = _split(rest + chunk, messages)
            start += len(chunk)
            whole = len(chunk) < CHUNK_BYTES
        if rest:
            raise CorruptTensor("the latents of the request are cut short")
        return messages

    def _read_latents(self, request_id: str, start: int) -> bytes:
        """A piece: together they are as large as the latents, and they must not be in memory twice."""
        try:
            return self._objects.read(f"latents/{request_id}", start, start + CHUNK_BYTES)
        except FileNotFoundError as error:
            raise CorruptTensor("the latents of the request are gone") from error

    async def checkpoints_of(self, request_id: str) -> list[str]:
        """Names of the checkpoints that owners of a request have kept among the latents so far."""
        found = await self._in_thread(lambda: list(self._objects.listed(f"latents/{request_id}.")))
        return [stored.name.removeprefix("latents/") for stored in found]

    async def drop_latents(self, *names: str) -> None:
        """Forgets them, as `drop`."""
        if names:
            await self._drop([f"latents/{name}" for name in names])

    async def _drop(self, names: list[str]) -> None:
        try:
            await self.delete(names)
        except ServiceError as error:
            log.warning("%s stays for now: %s", names[0] if names else "nothing", error.message)

    async def listed(self, kind: str) -> AsyncIterator[list[Stored]]:
        """All objects of a kind, as many at once as memory bears.

        Raises:
            ArtifactStoreDown: the store does not answer.
        """
        found = self._objects.listed(f"{kind}/")
        while batch := await self._in_thread(lambda: list(islice(found, LISTED_AT_ONCE))):
            yield batch

    async def delete(self, names: Sequence[str]) -> None:
        """Removes objects, those that are there.

        Raises:
            ArtifactStoreDown: the store does not answer.
        """
        await self._in_thread(self._objects.delete, names)

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)


def _split(data: bytes, messages: list[bytes]) -> bytes:
    """Takes the whole messages out of a piece of kept latents; returns what is left of it."""
    start = 0
    while start + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, start)
        end = start + _LENGTH.size + length
        if end > len(data):
            break
        messages.append(data[start + _LENGTH.size : end])
        start = end
    return data[start:]


def open_store(section: StoreSection) -> Store:
    """The store that a config names.

    Raises:
        StartupError: it cannot be used.
    """
    if not section.path.startswith("s3://"):
        return Store(Folder(Path(section.path)))
    return Store(Bucket(section.path, section.endpoint_url))


def artifact_name(request_id: str, fence: int) -> str:
    """The file of one owner of a request: one that has lost it cannot touch another's."""
    return f"{request_id}.{fence}"


def manifest_of(name: str, artifact: gateway_pb2.Artifact, chunks: Sequence[str]) -> bytes:
    """What was made, by whom, and how to tell whether it is still that, whole and by its chunks."""
    manifest = {
        "request_id": name.rpartition(".")[0],
        "mime": artifact.mime,
        "nbytes": artifact.nbytes,
        "sha256": artifact.sha256,
        "width": artifact.width,
        "height": artifact.height,
        "num_frames": artifact.num_frames,
        "fps": artifact.fps,
        "chunk_bytes": CHUNK_BYTES,
        "chunks": list(chunks),
    }
    return json.dumps(manifest).encode()


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise WrongState("the artifact of the request is gone") from error


def _corrupt(name: str, what: str) -> CorruptArtifact:
    log.error("artifact %s: %s", name, what)
    return CorruptArtifact(f"the artifact of the request is corrupt: {what}")
