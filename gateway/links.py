"""Links to artifacts that work without an access key, for a while: signed with a key that all gateways have.

Without a key file, the key is in Redis. Every gateway reaches that, whatever the store is; and a link is worth nothing
without its request's record, which is there too, so whoever loses one loses both. A bucket's readers could sign with a
key in the bucket.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from services.errors import LinkExpired, LinkRefused, StartupError, StateStoreDown

KEY_BYTES = 32
# Redis may have been emptied, and another gateway may have made a new key since.
KEY_AGE_S = 60.0
_EXPIRES = re.compile(r"[0-9]{1,12}", re.ASCII)
_SIGNATURE = re.compile(r"[0-9a-f]{64}", re.ASCII)


def content_path(request_id: str) -> str:
    """Path of a request's result on any gateway."""
    return f"/v1/requests/{request_id}/content"


class Links:
    """Makes signed links and checks them.

    Args:
        shared_key: brings the gateways' common key from Redis, which is the one given if there was none.
        key_file: holds the key instead; 32 bytes at least.
        lifetime_s: how long a link holds.

    Raises:
        StartupError: the file cannot be read or is too short, or the lifetime is not positive.
    """

    def __init__(self, shared_key: Callable[[bytes], Awaitable[bytes]], key_file: str, lifetime_s: float) -> None:
        if lifetime_s <= 0:
            raise StartupError(f"store.link_s is {lifetime_s:g}: links must hold for more than 0 seconds")
        self._shared_key = shared_key
        self._lifetime_s = lifetime_s
        self._fixed = bool(key_file)
        self._key = _read_key(Path(key_file)) if key_file else secrets.token_bytes(KEY_BYTES)
        self._asked_s = float("-inf")

    async def link(self, path: str) -> str:
        """The path with an expiry and a signature.

        Raises:
            StateStoreDown: the key is in Redis, which has not answered yet.
        """
        # Upwards: a link holds for as long as was promised, not almost.
        expires = str(int(time.time() + self._lifetime_s) + 1)
        return f"{path}?expires={expires}&signature={_sign(await self._current_key(), path, expires)}"

    async def is_signed(self, path: str, query: Mapping[str, str]) -> bool:
        """Whether a GET or HEAD of this path carries a valid signature. False when it carries none at all.

        Raises:
            LinkRefused: the signature is not ours, or is of another path or expiry.
            LinkExpired: it was valid once.
            StateStoreDown: as `link`.
        """
        if "expires" not in query and "signature" not in query:
            return False
        expires, signature = query.get("expires", ""), query.get("signature", "")
        if not _EXPIRES.fullmatch(expires) or not _SIGNATURE.fullmatch(signature):
            raise LinkRefused("the link is not one of ours: expires must be a Unix time and signature 64 hex digits")
        if not hmac.compare_digest(signature, _sign(await self._current_key(), path, expires)):
            raise LinkRefused("the signature of the link is not ours: take the link as the gateway gave it, unchanged")
        if int(expires) <= time.time():
            raise LinkExpired("the link has expired: ask for the request again to get a new one")
        return True

    async def _current_key(self) -> bytes:
        if not self._fixed and time.monotonic() - self._asked_s > KEY_AGE_S:
            try:
                self._key = await self._shared_key(self._key)
            except StateStoreDown:
                # The one of a minute ago is most likely still right; without any, nobody could check a link.
                if self._asked_s == float("-inf"):
                    raise
            self._asked_s = time.monotonic()
        return self._key


def _sign(key: bytes, path: str, expires: str) -> str:
    return hmac.new(key, f"GET\n{path}\n{expires}".encode(), hashlib.sha256).hexdigest()


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise StartupError(f"store.link_key_file {path} cannot be read: {error.strerror}") from error
    if len(key) < KEY_BYTES:
        raise StartupError(f"store.link_key_file {path} holds {len(key)} bytes: it must hold {KEY_BYTES} at least")
    return key
