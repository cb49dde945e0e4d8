"""Configuration: unknown keys, wrong types and broken files are errors that say what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightloom.cluster_config import ClusterConfig, load_cluster, parse_replicas, write_toml
from services.config import StageConfig, override, parse, read_toml
from services.errors import StartupError

ROOT = Path(__file__).resolve().parents[2]
STAGE = {"service": {"port": 5000}, "model": {"name": "demo", "source": "folder"}}


def test_defaults_and_overrides() -> None:
    table = override(dict(STAGE), ["engine.max_batch=3", "model.device=cpu", "service.name='a b'"])
    config = parse(StageConfig, table)
    assert (config.engine.max_batch, config.model.device, config.service.name) == (3, "cpu", "a b")
    assert config.service.max_in_flight == 16


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({**STAGE, "modle": {}}, r"unknown config key modle: allowed are engine, features"),
        ({**STAGE, "engine": {"max_batches": 1}}, r"unknown config key engine.max_batches"),
        ({"service": {"port": 1}, "model": {"name": "demo"}}, r"config key model.source is missing"),
        ({**STAGE, "engine": {"max_batch": "4"}}, r"engine.max_batch must be of type int, not '4'"),
        ({**STAGE, "engine": {"max_batch": True}}, r"engine.max_batch must be of type int, not True"),
        ({**STAGE, "engine": 4}, r"engine must be a section"),
        ({**STAGE, "limits": []}, r"limits must be a section"),
    ],
)
def test_wrong_tables(table: dict[str, object], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        parse(StageConfig, table)


@pytest.mark.parametrize("setting", ["engine", "=3", "service.port.x=1"])
def test_wrong_settings(setting: str) -> None:
    with pytest.raises(StartupError, match="--set"):
        override({"service": {"port": 1}}, [setting])


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="does not exist"):
        read_toml(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[a\n")
    with pytest.raises(StartupError, match="line 1"):
        read_toml(broken)


def test_written_tables_read_back(tmp_path: Path) -> None:
    table = {"a": {"text": 'quote " and \\', "number": 1.5, "flag": True, "list": [1, 2], "b": {"c": ""}}}
    write_toml(tmp_path / "t.toml", table)
    assert read_toml(tmp_path / "t.toml") == table


def test_every_shipped_cluster_file_is_valid() -> None:
    files = sorted((ROOT / "deploy/config").glob("*.toml"))
    assert files
    for path in files:
        assert load_cluster(path).models, path


def test_cluster_file_names_bad_replicas(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[models.m]\nsource = "x"\n[models.m.replicas]\nditt = 2\n')
    with pytest.raises(StartupError, match="unknown stage 'ditt', there are text_encoder, dit, vae"):
        load_cluster(path)
    with pytest.raises(StartupError, match="names no model"):
        path.write_text("[models]\n")
        load_cluster(path)


def test_replica_settings() -> None:
    assert parse_replicas(["dit=3", "vae=0"]) == {"dit": 3, "vae": 0}
    for wrong in ("dit", "dit=x", "dit=-1", "dit=65", "dot=1"):
        with pytest.raises(StartupError):
            parse_replicas([wrong])


def test_cluster_config_needs_models() -> None:
    with pytest.raises(StartupError, match="models"):
        parse(ClusterConfig, {})
