"""Weight files that are missing, cut, foreign or of another shape: a StartupError that names the file."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from services.errors import StartupError
from services.families import load_family
from services.weights import check_safetensors, open_source

CPU = torch.device("cpu")
FAMILY = load_family("qwen_image")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    FAMILY.tiny(folder, "t2i", 0)
    return folder


def weights(folder: Path) -> Path:
    [path] = folder.glob("*.safetensors")
    return path


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def rename(folder: Path) -> None:
    weights(folder).rename(folder / "diffusion_pytorch_model.bin")


def forget_a_shard(folder: Path) -> None:
    index = {"weight_map": {"a": weights(folder).name, "b": "second.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"base_dim": 2 * config["base_dim"]}))


SPOILS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda folder: weights(folder).unlink(), "has no *.safetensors file"),
    "pickled": (rename, "other formats are never read"),
    "a shard gone": (forget_a_shard, "second.safetensors is missing"),
    "cut": (lambda folder: weights(folder).write_bytes(weights(folder).read_bytes()[:-7]), "but its header says"),
    "longer": (lambda folder: weights(folder).write_bytes(weights(folder).read_bytes() + b"x"), "but its header says"),
    "empty": (lambda folder: weights(folder).write_bytes(b""), "cut short (0 bytes)"),
    "noise": (lambda folder: weights(folder).write_bytes(b"\xff" * 4096), "is not a safetensors file"),
    "no json": (lambda folder: weights(folder).write_bytes(header(b"{nothing")), "broken header"),
    "odd json": (lambda folder: weights(folder).write_bytes(header(b'{"a": {"offsets": 1}}')), "broken header"),
    "of other shapes": (widen, "cannot load weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "cannot load weights"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "cannot load weights"),
}


@pytest.mark.parametrize("case", SPOILS)
def test_bad_weights_are_named(tiny: Path, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    spoil, words = SPOILS[case]
    spoil(folder / "vae")
    with pytest.raises(StartupError) as caught:
        FAMILY.vae.load(open_source(str(folder)), CPU, torch.float32)
    assert words in str(caught.value) and str(folder / "vae") in str(caught.value)


def test_missing_parameters_are_named(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    save_file({"something.else": torch.zeros(3)}, weights(folder / "vae"))
    with pytest.raises(StartupError, match="vae"):
        FAMILY.vae.load(open_source(str(folder)), CPU, torch.float32)


def test_good_weights_pass_the_check(tiny: Path) -> None:
    for name in ("text_encoder", "transformer", "vae"):
        check_safetensors(tiny / name)


def test_folders_that_are_no_model(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="nowhere does not exist"):
        open_source("nowhere")
    with pytest.raises(StartupError, match=r"model_index.json is missing"):
        open_source(str(tmp_path))
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(StartupError, match="must hold a JSON object"):
        open_source(str(tmp_path))
    with pytest.raises(StartupError, match="served by family 'qwen_image', not 'wan'"):
        open_source(str(tiny), family="wan")


def test_component_ids_follow_the_weights(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    ours, copy = open_source(str(tiny)), open_source(str(folder))
    assert ours.component_id("vae", ["vae"]) == copy.component_id("vae", ["vae"])
    path = weights(folder / "vae")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert ours.component_id("vae", ["vae"]) != copy.component_id("vae", ["vae"])
    assert ours.component_id("dit", ["transformer"]) == copy.component_id("dit", ["transformer"])
