"""API keys as a file: one JSON object a line, with the hash of the key and what it allows.

Written by `lightloom key`, read by gateways, which follow its changes. A key is `ll_ID_SECRET`; the secret has 256
random bits, so one SHA-256 is enough: nobody can try them all, and a slow hash (scrypt) would only cost every call
tens of milliseconds of a core, for anyone who sends a guess.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from services.config import parse
from services.errors import StartupError
from services.files import stamp

log = logging.getLogger(__name__)

# `read_all` lifts `read` and `abort` from the key's own tenant to every tenant.
SCOPES = ("generate", "read", "read_all", "abort")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """What a key allows. Quotas of 0 are none; cost is in megapixel-steps (`gateway/cost.py`)."""

    id: str
    name: str
    tenant: str
    scopes: tuple[str, ...]
    sha256: str = field(repr=False)
    requests_per_minute: float = 0.0
    cost_per_hour: float = 0.0
    created_unix_s: float = 0.0


def create_key(path: Path, key: ApiKey) -> str:
    """Adds a key to the file and returns its text, which is stored nowhere. `id`, `sha256` and time are made here.

    Raises:
        StartupError: a name that is taken or not allowed, an unknown scope, a file that cannot be written.
    """
    key_id = secrets.token_hex(6)
    text = f"ll_{key_id}_{secrets.token_urlsafe(32)}"
    made = {"id": key_id, "sha256": _hash(text), "created_unix_s": round(time.time(), 3)}
    table = asdict(key) | made | {"scopes": list(key.scopes)}
    with _rewriting(path) as keys:
        if any(known.name == key.name for known in keys):
            raise StartupError(f"there is a key {key.name!r} already: revoke it first, or choose another name")
        keys.append(_key_of(table, "the new key"))
    return text


def revoke_key(path: Path, name: str) -> ApiKey:
    """Takes the key of that name or id out of the file.

    Raises:
        StartupError: there is none, or the file cannot be written.
    """
    with _rewriting(path) as keys:
        for key in keys:
            if name in (key.name, key.id):
                keys.remove(key)
                return key
        raise StartupError(f"{path} has no key {name!r}: there are {', '.join(k.name for k in keys) or 'none'}")


def read_keys(path: Path) -> list[ApiKey]:
    """The keys of a file.

    Raises:
        StartupError: it cannot be read, or a line is no key.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        # Absolute: the path in a config is relative to the working directory, which nobody sees.
        raise StartupError(f"the keys file {path.absolute()} cannot be read: {error}") from error
    keys = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                table = json.loads(line)
            except json.JSONDecodeError as error:
                raise StartupError(f"{path}, line {number}: not JSON: {error.msg}") from error
            keys.append(_key_of(table, f"{path}, line {number}"))
    return keys


class KeyFile:
    """The keys of a gateway; the file is read again when it has changed.

    A change that cannot be read leaves the keys as they were, with an error in the log: one slip of an editor must not
    lock every client out.

    Raises:
        StartupError: as `read_keys`, when it is made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = stamp(path)
        self._keys = {key.id: key for key in read_keys(path)}

    def find(self, text: str) -> ApiKey | None:
        """The key with that text; None when it is unknown or revoked."""
        self._follow()
        _, _, rest = text.partition("_")
        key = self._keys.get(rest.partition("_")[0])
        # The id is no secret. The hashes are compared in a time that does not depend on where they differ.
        return key if key is not None and hmac.compare_digest(key.sha256, _hash(text)) else None

    def _follow(self) -> None:
        now = stamp(self._path)
        if now == self._stamp:
            return
        self._stamp = now
        try:
            self._keys = {key.id: key for key in read_keys(self._path)}
        except StartupError as error:
            log.error("the API keys stay as they were: %s", error)
        else:
            log.info("read %d API keys", len(self._keys))


def _key_of(table: object, where: str) -> ApiKey:
    if not isinstance(table, dict):
        raise StartupError(f"{where}: not a JSON object")
    try:
        key = parse(ApiKey, table)
    except StartupError as error:
        raise StartupError(f"{where}: {error}") from error
    for what, name in (("name", key.name), ("tenant", key.tenant)):
        if not _NAME.fullmatch(name):
            raise StartupError(f"{where}: {what} {name!r}: use up to 63 letters, digits, dots, dashes, underscores")
    unknown = [scope for scope in key.scopes if scope not in SCOPES]
    if unknown or not key.scopes:
        what = f"unknown scope {unknown[0]!r}" if unknown else "no scope"
        raise StartupError(f"{where}: {what}: there are {', '.join(SCOPES)}")
    if not (0 <= key.requests_per_minute < float("inf") and 0 <= key.cost_per_hour < float("inf")):
        raise StartupError(f"{where}: a quota is negative or not finite: write 0 for none")
    if not _SHA256.fullmatch(key.sha256):
        raise StartupError(f"{where}: sha256 has not 64 hexadecimal digits in lower case: no key would ever match it")
    return key


@contextlib.contextmanager
def _rewriting(path: Path) -> Iterator[list[ApiKey]]:
    """The keys to change; the file is replaced as a whole, readable for its owner only, one writer at a time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise StartupError(f"the keys file {path} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = read_keys(path) if path.exists() else []
        yield keys
        fresh = path.with_name(f".{path.name}.new")
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.writelines(json.dumps(asdict(key)) + "\n" for key in keys)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise StartupError(f"the keys file {path} cannot be written: {error.strerror}") from error
    finally:
        os.close(folder)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
