"""What cannot start says why in one line, ends with exit code 2, and shows no trace."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightloom.cluster_config import write_toml
from services.config import environment_with_malloc
from services.families import load_family
from services.free_port import free_port
from tests.cluster.stage_process import ROOT

STAGES = {"text_encoder_svc": "text_encoder", "dit_svc": "transformer", "vae_svc": "vae"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    load_family("qwen_image").tiny(folder, "t2i", 0)
    return folder


async def run(module: str, config: Path, table: dict, *settings: str) -> tuple[int, str]:
    """Starts a process that must give up; its exit code and all that it said."""
    write_toml(config, table)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, "--config", str(config), *settings),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment_with_malloc(),
    )
    try:
        said, _ = await asyncio.wait_for(process.communicate(), 100)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, said.decode()


def check(answer: tuple[int, str], *words: str) -> None:
    code, said = answer
    last = said.splitlines()[-1]
    assert code == 2, said
    assert all(word in last for word in words), said
    assert "Traceback" not in said


def stage(source: Path | str) -> dict:
    return {"service": {"port": free_port()}, "model": {"name": "tiny", "source": str(source), "threads": 1}}


# ---- Weights --------------------------------------------------------------------------------------------------------


def weight_file(folder: Path) -> Path:
    [path] = folder.glob("*.safetensors")
    return path


def missing(folder: Path) -> str:
    weight_file(folder).unlink()
    return "has no *.safetensors file"


def cut(folder: Path) -> str:
    path = weight_file(folder)
    path.write_bytes(path.read_bytes()[:-1000])
    return "but its header says"


def of_another_size(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    if "text_config" in config:
        config["text_config"]["hidden_size"] *= 2
    else:
        config |= {"attention_head_dim": 32} if "attention_head_dim" in config else {"base_dim": 16}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("module", STAGES)
async def test_a_stage_with_bad_weights_names_them(tiny, tmp_path, module):
    async def one(spoil: Callable[[Path], str]) -> None:
        folder = tmp_path / spoil.__name__
        shutil.copytree(tiny, folder)
        for other in set(STAGES.values()) - {STAGES[module]}:
            # A stage reads its own weights only: that the others' are gone is no matter.
            missing(folder / other)
        words = spoil(folder / STAGES[module])
        answer = await run(module, tmp_path / f"{spoil.__name__}.toml", stage(folder))
        check(answer, STAGES[module], words)

    await asyncio.gather(one(missing), one(cut), one(of_another_size))


async def test_a_model_folder_that_is_none(tmp_path):
    check(await run("dit_svc", tmp_path / "dit.toml", stage("nowhere")), "model folder nowhere does not exist")


# ---- Settings and ports ---------------------------------------------------------------------------------------------


async def test_unknown_keys_and_features_are_named(tiny, tmp_path):
    answers = await asyncio.gather(
        run("dit_svc", tmp_path / "a.toml", stage(tiny) | {"engine": {"max_batches": 2}}),
        run("dit_svc", tmp_path / "b.toml", stage(tiny) | {"features": {"magic": {}}}),
        run("dit_svc", tmp_path / "d.toml", stage(tiny) | {"limits": {"max_step": 9}}),
        run("gateway", tmp_path / "e.toml", {"gateway": {"speed": 1}}),
        run("gateway", tmp_path / "f.toml", {"gateway": {"http_port": "many"}}),
        run("gateway", tmp_path / "g.toml", {}, "--set=redis"),
    )
    for answer, words in zip(
        answers,
        (
            "unknown config key engine.max_batches",
            "unknown feature 'magic'",
            "unknown config key limits.max_step",
            "unknown config key gateway.speed",
            "gateway.http_port must be of type int",
            "--set 'redis'",
        ),
        strict=True,
    ):
        check(answer, words)


@pytest.mark.parametrize("which", ["http_port", "grpc_port"])
async def test_a_gateways_port_in_use_is_named(tmp_path, which):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"http_port": free_port(), "grpc_port": free_port(), which: port}
        table = {"gateway": ports, "store": {"path": str(tmp_path / "store")}}
        check(await run("gateway", tmp_path / "gateway.toml", table), str(port), "cannot be bound")


async def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    table = {
        "gateway": {"http_port": free_port(), "grpc_port": free_port()},
        "store": {"path": str(tmp_path / "file/store")},
    }
    check(await run("gateway", tmp_path / "gateway.toml", table), "artifact store", "cannot be written")
