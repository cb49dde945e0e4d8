"""Objects in an S3 bucket. Credentials come from where AWS's own tools take them, and from nowhere else.

A PUT is atomic, and the service checks what arrived against a checksum. boto3 is an extra: `lightloom[s3]`.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from gateway.objects import RETRY_AFTER_S, Pieces, Stored
from services.errors import ArtifactStoreDown, ArtifactStoreFull, ServiceError, StartupError

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
# Of one read or write of the socket, not of a whole transfer.
READ_TIMEOUT_S = 10.0
TRIES = 3
MAX_CONNECTIONS = 16
# As many names as one call of S3 may delete.
DELETE_BATCH = 1000


class Bucket:
    """A bucket, below a prefix.

    Args:
        url: `s3://bucket/prefix`.
        endpoint_url: of a service other than Amazon's; buckets are then in the path, not in the host's name.

    Raises:
        StartupError: boto3 is missing, or the bucket cannot be written.
    """

    def __init__(self, url: str, endpoint_url: str) -> None:
        parts = urlsplit(url)
        self._bucket, prefix = parts.netloc, parts.path.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        if not self._bucket or "@" in self._bucket:
            raise StartupError("store.path is no bucket: write it as s3://bucket/prefix, without credentials")
        if "@" in endpoint_url:
            raise StartupError("store.endpoint_url must hold no credentials: set AWS_ACCESS_KEY_ID and its fellows")
        self._client = _client(endpoint_url)
        probe = f"probes/{secrets.token_hex(8)}"
        try:
            self.write({probe: [b""]}, durable=True)
            self.delete([probe])
        except ServiceError as error:
            raise StartupError(f"the artifact store s3://{self._bucket} cannot be used: {error.message}") from error

    def write(self, objects: Mapping[str, Pieces], *, durable: bool) -> None:
        """As Objects.write. S3 has kept an object when it says so, `durable` or not."""
        begun: list[str] = []
        try:
            for name, pieces in objects.items():
                begun.append(name)
                body = b"".join(pieces)
                self._call("put_object", Key=self._prefix + name, Body=body)
        except ServiceError:
            # One whose answer was lost may be there too.
            with contextlib.suppress(ServiceError):
                self.delete(begun)
            raise

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """As Objects.read."""
        part = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        answer = self._call("get_object", Key=self._prefix + name, **part)
        if answer is None:
            return b""
        with _told("get_object"):
            return bytes(answer["Body"].read())

    def delete(self, names: Sequence[str]) -> None:
        """As Objects.delete."""
        for start in range(0, len(names), DELETE_BATCH):
            keys = [{"Key": self._prefix + name} for name in names[start : start + DELETE_BATCH]]
            answer = self._call("delete_objects", Delete={"Objects": keys, "Quiet": True})
            if errors := answer.get("Errors"):
                raise _refused("delete_objects", errors[0].get("Code", ""), 0)

    def listed(self, prefix: str) -> Iterator[Stored]:
        """As Objects.listed."""
        pages = self._client.get_paginator("list_objects_v2")
        with _told("list_objects_v2"):
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for item in page.get("Contents", ()):
                    name = item["Key"].removeprefix(self._prefix)
                    yield Stored(name, item["Size"], item["LastModified"].timestamp())

    def _call(self, operation: str, **arguments: Any) -> Any:
        """The answer; None for a range that begins behind the object's end."""
        with _told(operation):
            try:
                return getattr(self._client, operation)(Bucket=self._bucket, **arguments)
            except self._client.exceptions.ClientError as error:
                if error.response["Error"]["Code"] == "InvalidRange":
                    return None
                raise


def _client(endpoint_url: str) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise StartupError("a store in S3 needs boto3: pip install 'lightloom[s3]'") from error
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": TRIES},
        max_pool_connections=MAX_CONNECTIONS,
        s3={"addressing_style": "path" if endpoint_url else "auto"},
    )
    try:
        return boto3.session.Session().client("s3", endpoint_url=endpoint_url or None, config=config)
    except (BotoCoreError, ValueError) as error:
        raise StartupError(f"the S3 client cannot be made: {error}") from error


@contextlib.contextmanager
def _told(operation: str) -> Iterator[None]:
    """Turns boto3's errors into ours. They name the operation and S3's code, and nothing that came with it."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    try:
        yield
    except ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        if code in ("NoSuchKey", "404") and operation == "get_object":
            raise FileNotFoundError from error
        raise _refused(operation, code, status) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise _refused(operation, type(error).__name__, 403) from error
    except BotoCoreError as error:
        log.warning("S3 %s: %s", operation, type(error).__name__)
        message = f"the artifact store does not answer ({type(error).__name__})"
        raise ArtifactStoreDown(message, retry_after_s=RETRY_AFTER_S) from error


def _refused(operation: str, code: str, status: int) -> ServiceError:
    log.warning("S3 %s: %s (%d)", operation, code, status)
    if status == 507 or code == "QuotaExceeded":
        return ArtifactStoreFull("the artifact store is full: try again later", retry_after_s=RETRY_AFTER_S)
    if status in (401, 403) or code == "AccessDenied":
        message = (
            f"the artifact store denies access ({code}): the gateway's credentials or the bucket's policy are wrong"
        )
    else:
        message = f"the artifact store refuses {operation} ({code})"
    return ArtifactStoreDown(message, retry_after_s=RETRY_AFTER_S)
