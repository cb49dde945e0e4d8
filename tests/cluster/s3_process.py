"""S3 as a real HTTP server for tests: moto's, in a process of its own. It keeps what it holds in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import httpx
from botocore.config import Config

from services.free_port import free_port
from tests.cluster.running import wait_for

BUCKET = "pictures"
SECRET = "a-secret-that-nobody-may-read"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIATESTING",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class S3Process:
    """The server, a bucket in it, and a client that sees what is there.

    Args:
        tls: the files `cert`, `key` and `ca` of a server with TLS.
    """

    def __init__(self, folder: Path, host: str = "127.0.0.1", tls: Mapping[str, str] | None = None) -> None:
        self._host, self._tls = host, tls or {}
        self.port = free_port()
        self.url = f"{'https' if tls else 'http'}://{host}:{self.port}"
        self.path = f"s3://{BUCKET}/some/prefix"
        self._log = folder / "s3.log"
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id="another",
            aws_secret_access_key="another",
            region_name="us-east-1",
            verify=self._tls.get("ca"),
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )
        self.start()

    def start(self) -> None:
        """Empty, with the bucket."""
        command = [sys.executable, "-m", "moto.server", "-H", self._host, "-p", str(self.port)]
        if self._tls:
            command += ["-s", "-c", self._tls["cert"], "-k", self._tls["key"]]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(self._answers, 60)
        self.client.create_bucket(Bucket=BUCKET)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        try:
            return httpx.get(f"{self.url}/moto-api/", verify=not self._tls).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def deny(self, denied: bool) -> None:
        """From now on, no credentials are good; or all are."""
        calls = "0" if denied else "inf"
        httpx.post(f"{self.url}/moto-api/reset-auth", content=calls).raise_for_status()

    def names(self) -> list[str]:
        """Of all objects, below the prefix."""
        found = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return [item["Key"].removeprefix("some/prefix/") for item in found]

    def get(self, name: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=f"some/prefix/{name}")["Body"].read()

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=f"some/prefix/{name}", Body=data)

    def delete(self, name: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=f"some/prefix/{name}")


@contextmanager
def s3_server(folder: Path, **options: Any) -> Iterator[S3Process]:
    """A server that answers."""
    running = S3Process(folder, **options)
    try:
        yield running
    finally:
        running.kill()
