"""The keys file: what is written, what is refused, and when a gateway needs one."""

from __future__ import annotations

import concurrent.futures
import json
import stat
from pathlib import Path

import pytest

from gateway.access import open_keys
from gateway.config import GatewayConfig
from gateway.keys import ApiKey, KeyFile, create_key, read_keys, revoke_key
from services.config import parse
from services.errors import StartupError


def wish(name: str, *scopes: str, tenant: str = "t", **quotas: float) -> ApiKey:
    return ApiKey(id="", name=name, tenant=tenant, scopes=scopes or ("read",), sha256="", **quotas)


def test_a_key_is_stored_as_its_hash_only_and_found_by_its_text(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    text = create_key(file, wish("a", "generate", "read", cost_per_hour=5))
    assert text.split("_", 2)[2] not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    keys = KeyFile(file)
    found = keys.find(text)
    assert found is not None and (found.name, found.scopes, found.cost_per_hour) == ("a", ("generate", "read"), 5.0)
    assert found.sha256 not in repr(found)
    for wrong in ("", "ll_", text[:-1], text + "x", text.replace("ll_", "xx_"), f"ll_{found.id}_", "ü_ü_ü"):
        assert keys.find(wrong) is None, wrong


def test_a_gateway_follows_the_file_and_survives_its_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.jsonl"
    text = create_key(file, wish("a"))
    keys = KeyFile(file)
    other = create_key(file, wish("b"))
    assert keys.find(text) and keys.find(other)
    revoke_key(file, "a")
    assert keys.find(text) is None and keys.find(other)
    file.unlink()
    assert keys.find(other)
    assert "the API keys stay as they were" in caplog.text


def test_keys_made_at_once_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda index: create_key(file, wish(f"k{index}")), range(16)))
    keys = KeyFile(file)
    assert all(keys.find(text) for text in texts) and len(read_keys(file)) == 16


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (wish("a", "generated"), r"unknown scope 'generated': there are generate, read, read_all, abort"),
        (wish("a b"), r"name 'a b': use up to 63 letters"),
        (wish("a", tenant="x/y"), r"tenant 'x/y': use"),
        (wish("a", requests_per_minute=-1), r"quota is negative"),
        (wish("a", cost_per_hour=float("nan")), r"quota is negative or not finite"),
        (wish("taken"), r"there is a key 'taken' already"),
    ],
)
def test_wrong_wishes_change_nothing(tmp_path: Path, key: ApiKey, message: str) -> None:
    file = tmp_path / "keys.jsonl"
    create_key(file, wish("taken"))
    before = file.read_text()
    with pytest.raises(StartupError, match=message):
        create_key(file, key)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON"),
        ("[]", r"line 2: not a JSON object"),
        ("{}", r"line 2: config key id is missing"),
        ('{"id": 1}', r"line 2: .*id must be of type str"),
        (json.dumps({"id": "a", "name": "a", "tenant": "a", "scopes": "read", "sha256": ""}), "scopes must be a list"),
        (json.dumps({"id": "a", "name": "a", "tenant": "a", "scopes": [], "sha256": ""}), "no scope: there are"),
        (
            json.dumps({"id": "a", "name": "a", "tenant": "a", "scopes": ["read"], "sha256": "A" * 64}),
            "line 2: sha256 has not 64",
        ),
        (json.dumps({"id": "a", "secret": ""}), "unknown config key secret"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "keys.jsonl"
    file.write_text(f"\n{line}\n")
    with pytest.raises(StartupError, match=message):
        KeyFile(file)
    with pytest.raises(StartupError, match="cannot be read"):
        KeyFile(tmp_path / "none")


def config(host: str, **access: object) -> GatewayConfig:
    return parse(GatewayConfig, {"gateway": {"host": host}, "access": access})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "localhost", "::1"])
def test_without_keys_a_gateway_binds_loopback(host: str) -> None:
    assert open_keys(config(host)) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "no.such.host.invalid", ""])
def test_without_keys_a_gateway_binds_nothing_else(tmp_path: Path, host: str) -> None:
    with pytest.raises(StartupError, match=r"lightloom key create.*access.keys_file.*access.allow_anonymous = true"):
        open_keys(config(host))
    assert open_keys(config(host, allow_anonymous=True)) is None
    create_key(tmp_path / "keys", wish("a"))
    assert open_keys(config(host, keys_file=str(tmp_path / "keys"))) is not None
