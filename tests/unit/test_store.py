"""The artifact store on a real folder and on a real S3 server: the same promises on both."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.exceptions import HTTPException

from gateway.config import StoreSection
from gateway.http_content import byte_range
from gateway.store import CHUNK_BYTES, artifact_name, open_store
from protos import gateway_pb2
from services.errors import (
    ArtifactStoreDown,
    CorruptArtifact,
    CorruptTensor,
    StartupError,
    WrongState,
)
from tests.cluster.s3_process import ENVIRONMENT, S3Process, s3_server

ROOT = Path(__file__).parents[2]
LATER = float("inf")
NAME = artifact_name("r" * 32, 7)
# Three chunks, the last one small.
LARGE = hashlib.sha256(b"seed").digest() * (2 * CHUNK_BYTES // 32) + b"the end"


class Place:
    """Two gateways' stores in one place, and what lies there, seen past them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        section = StoreSection(path=str(root))
        self.store, self.other = open_store(section), open_store(section)

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())

    def get(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def put(self, name: str, data: bytes) -> None:
        (self.root / name).write_bytes(data)

    def delete(self, name: str) -> None:
        (self.root / name).unlink()


class Bucket(Place):
    def __init__(self, server: S3Process) -> None:
        section = StoreSection(path=server.path, endpoint_url=server.url)
        self.store, self.other = open_store(section), open_store(section)
        self.names, self.get, self.put, self.delete = server.names, server.get, server.put, server.delete


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[S3Process]:
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3")) as server:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def bucket(s3) -> Bucket:
    return Bucket(s3)


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path) -> Place:
    if request.param == "folder":
        return Place(tmp_path / "store")
    bucket: Bucket = request.getfixturevalue("bucket")
    for name in bucket.names():
        bucket.delete(name)
    return bucket


async def put(place: Place, data: bytes, **fields: object) -> gateway_pb2.Artifact:
    artifact = gateway_pb2.Artifact(mime="image/png", **fields)
    await place.store.put(NAME, data, artifact, LATER)
    return artifact


async def read(place: Place, artifact: gateway_pb2.Artifact, start: int = 0, stop: int | None = None) -> bytes:
    """By a gateway that did not write it."""
    pieces = place.other.read(NAME, artifact, start, artifact.nbytes if stop is None else stop)
    return b"".join([piece async for piece in pieces])


async def test_an_artifact_comes_back_whole_and_in_part(place) -> None:
    artifact = await put(place, LARGE)
    assert (artifact.nbytes, artifact.sha256) == (len(LARGE), hashlib.sha256(LARGE).hexdigest())
    assert await read(place, artifact) == LARGE
    for start, stop in [
        (0, 1),
        (5, CHUNK_BYTES),
        (CHUNK_BYTES, CHUNK_BYTES + 1),
        (CHUNK_BYTES - 3, 2 * CHUNK_BYTES + 2),
        (len(LARGE) - 1, len(LARGE)),
    ]:
        assert await read(place, artifact, start, stop) == LARGE[start:stop]
    assert place.names() == [f"artifacts/{NAME}", f"artifacts/{NAME}.json"]


async def test_the_manifest_says_what_it_is(place) -> None:
    artifact = await put(place, b"clip", width=64, height=32, num_frames=9, fps=16.0)
    assert json.loads(place.get(f"artifacts/{NAME}.json")) == {
        "request_id": "r" * 32,
        "mime": "image/png",
        "nbytes": 4,
        "sha256": artifact.sha256,
        "width": 64,
        "height": 32,
        "num_frames": 9,
        "fps": 16.0,
        "chunk_bytes": CHUNK_BYTES,
        "chunks": [artifact.sha256],
    }


async def test_an_empty_artifact_is_one_too(place) -> None:
    assert await read(place, await put(place, b"")) == b""


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: flipped(data, 0),
        lambda data: flipped(data, len(data) - 1),
        lambda data: data[:-1],
        lambda data: data[: CHUNK_BYTES + 1],
        lambda data: data + b"more",
        lambda data: b"",
    ],
    ids=["first", "last", "cut", "cut early", "grown", "empty"],
)
async def test_a_damaged_artifact_is_never_served_as_good(place, damage: Callable[[bytes], bytes]) -> None:
    artifact = await put(place, LARGE)
    place.put(f"artifacts/{NAME}", damage(LARGE))
    with pytest.raises(CorruptArtifact):
        await read(place, artifact)
    # Not one byte of a damaged piece is given.
    given = b""
    with pytest.raises(CorruptArtifact):
        async for piece in place.other.read(NAME, artifact, 0, artifact.nbytes):
            given += piece
    assert LARGE.startswith(given)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"\xff", b'{"chunks": 5}', "other"])
async def test_a_wrong_manifest_is_told(place, text) -> None:
    artifact = await put(place, b"a picture")
    if text == "other":
        text = place.get(f"artifacts/{NAME}.json").replace(artifact.sha256[:8].encode(), b"00000000")
    place.put(f"artifacts/{NAME}.json", text)
    with pytest.raises(CorruptArtifact, match="manifest"):
        await read(place, artifact)


@pytest.mark.parametrize("suffix", ["", ".json"])
async def test_an_artifact_that_is_gone_is_told(place, suffix: str) -> None:
    artifact = await put(place, b"a picture")
    place.delete(f"artifacts/{NAME}{suffix}")
    with pytest.raises(WrongState, match="gone"):
        await read(place, artifact)


async def test_another_gateway_goes_on_with_latents(place) -> None:
    messages = [b"", b"frame" * 1000, b"\x00"]
    await place.store.put_latents("a", messages, LATER)
    other = place.other
    assert await other.latents("a") == messages
    for length in (2, 6, len(place.get("latents/a")) - 1):
        place.put("latents/a", place.get("latents/a")[:length])
        with pytest.raises(CorruptTensor, match="cut short"):
            await other.latents("a")
    await other.drop_latents("a")
    await other.drop_latents("a")
    assert place.names() == []
    with pytest.raises(CorruptTensor, match="gone"):
        await other.latents("a")


async def test_what_the_owners_of_a_request_wrote_can_be_dropped(place) -> None:
    store = place.store
    for request_id, fence in (("a", 1), ("a", 2), ("ab", 1)):
        await store.put(artifact_name(request_id, fence), b"x", gateway_pb2.Artifact(), LATER)
    await store.drop("a.1", "a.2", "a.3")
    assert place.names() == ["artifacts/ab.1", "artifacts/ab.1.json"]


async def test_a_folder_that_is_away_is_waited_for(tmp_path) -> None:
    place = Place(tmp_path / "store")
    store = place.store
    opened = asyncio.Event()
    store.writes.on_open = opened.set
    place.root.rename(tmp_path / "elsewhere")
    writing = asyncio.create_task(store.put(NAME, b"x", gateway_pb2.Artifact(), LATER))
    leaving = asyncio.create_task(store.put_latents("a", [b"x"], LATER))
    while store.writes.refusal is None:
        await asyncio.sleep(0.01)
    refusal = store.writes.refusal
    assert isinstance(refusal, ArtifactStoreDown) and refusal.retry_after_s > 0
    with pytest.raises(ArtifactStoreDown):
        await store.put("b.1", b"x", gateway_pb2.Artifact(), time.monotonic() + 0.1)
    leaving.cancel()
    assert not writing.done()
    (tmp_path / "elsewhere").rename(place.root)
    await writing
    await opened.wait()
    assert store.writes.refusal is None
    assert place.names() == [f"artifacts/{NAME}", f"artifacts/{NAME}.json"]


def test_one_that_alone_has_no_room_waits_alone_but_not_too_much_waits(tmp_path) -> None:
    command = [sys.executable, "-m", "tests.cluster.small_files", str(tmp_path / "store")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert ended.stdout == "small ones go on False\ntoo much waits True\nall is well 1048576\n", ended.stderr
    files = [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert sorted(files) == ["large", "small.1", "small.1.json"]


async def test_what_a_writer_that_died_left_is_listed_with_the_rest(tmp_path) -> None:
    place = Place(tmp_path)
    for name in ("artifacts/.a.1.77aa.part", "artifacts/b.1", "latents/.a.1.5.77aa.part", "latents/.a.77aa.part"):
        place.put(name, b"cut")
    checkpoints = await place.store.checkpoints_of("a")
    artifacts = [stored.name async for batch in place.store.listed("artifacts") for stored in batch]
    assert (len(artifacts), len(checkpoints)) == (2, 2)
    await place.store.delete([name for name in artifacts if name.endswith(".part")])
    await place.store.drop_latents(*checkpoints)
    assert place.names() == ["artifacts/b.1"]


async def test_of_a_write_that_fails_in_its_second_part_nothing_stays(tmp_path) -> None:
    place = Place(tmp_path / "store")
    store = place.store
    # The manifest cannot take its name.
    (place.root / f"artifacts/{NAME}.json").mkdir()
    with pytest.raises(ArtifactStoreDown):
        await store.put(NAME, b"x", gateway_pb2.Artifact(), time.monotonic())
    assert place.names() == []


async def test_s3_that_denies_or_is_away_is_told_without_secrets(s3, bucket, tmp_path, caplog) -> None:
    artifact = await put(bucket, b"x")
    s3.deny(True)
    try:
        with pytest.raises(ArtifactStoreDown, match="denies access"):
            await bucket.store.put("b.1", b"x", gateway_pb2.Artifact(), time.monotonic())
        with pytest.raises(ArtifactStoreDown, match="denies access"):
            await read(bucket, artifact)
        with pytest.raises(StartupError, match="denies access") as refused:
            Bucket(s3)
    finally:
        s3.deny(False)
    texts = caplog.text + str(refused.value)
    assert not any(value in texts for value in (ENVIRONMENT["AWS_ACCESS_KEY_ID"], ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]))
    with s3_server(tmp_path) as other:
        away = open_store(StoreSection(path=other.path, endpoint_url=other.url))
    with pytest.raises(ArtifactStoreDown, match="does not answer"):
        await away.latents("a")
    with pytest.raises(StartupError, match="does not answer"):
        open_store(StoreSection(path=other.path, endpoint_url=other.url))


class NoRoom(http.server.BaseHTTPRequestHandler):
    """What S3 services without room answer: their own codes and statuses, which moto does not have."""

    answer = (507, "XMinioStorageFull")

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, code = self.answer
        body = f"<Error><Code>{code}</Code><Message>full</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT


@pytest.mark.parametrize("answer", [(507, "XMinioStorageFull"), (403, "QuotaExceeded")])
async def test_a_bucket_without_room_is_full(s3, answer: tuple[int, str], monkeypatch) -> None:
    monkeypatch.setattr(NoRoom, "answer", answer)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoRoom) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(StartupError, match="is full"):
                open_store(StoreSection(path=s3.path, endpoint_url=f"http://127.0.0.1:{server.server_port}"))
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("path", "endpoint_url", "message"),
    [
        ("s3://", "", "no bucket"),
        ("s3://key:secret@bucket", "", "without credentials"),
        ("s3://bucket", "http://key:secret@127.0.0.1:1", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket", "nowhere", "S3 client cannot be made"),
        ("s3://nothing-here", "SERVER", "NoSuchBucket"),
    ],
)
def test_a_store_that_cannot_be_is_refused_at_the_start(s3, path: str, endpoint_url: str, message: str) -> None:
    endpoint_url = s3.url if endpoint_url == "SERVER" else endpoint_url
    with pytest.raises(StartupError, match=message) as refused:
        open_store(StoreSection(path=path, endpoint_url=endpoint_url))
    assert "secret" not in str(refused.value)


def test_without_boto3_the_start_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['boto3'] = None\n"
        "from gateway.store import open_store; from gateway.config import StoreSection\n"
        "open_store(StoreSection(path='s3://bucket'))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "StartupError: a store in S3 needs boto3: pip install 'lightloom[s3]'" in ended.stderr


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", None),
        ("bytes=0-0", (0, 1)),
        ("bytes=2-4", (2, 5)),
        ("bytes=7-", (7, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-30", (0, 10)),
        ("bytes=5-99999", (5, 10)),
        ("bytes= 1 - 2", (1, 3)),
        ("bytes=0-1,4-5", None),
        ("bytes=5-2", None),
        ("bytes=-", None),
        ("bytes=x-2", None),
        ("frames=0-1", None),
        ("bytes=10-", 416),
        ("bytes=10-12", 416),
        ("bytes=-0", 416),
    ],
)
def test_ranges(header: str, expected: tuple[int, int] | int | None) -> None:
    if expected == 416:
        with pytest.raises(HTTPException) as refused:
            byte_range(header, 10)
        assert (refused.value.status_code, refused.value.headers) == (416, {"Content-Range": "bytes */10"})
    else:
        assert byte_range(header, 10) == expected
