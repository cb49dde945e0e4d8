"""Each service reads its own components only: without the others' weights it starts and says what it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dit_svc.rank import DitProgram
from services.config import EngineSection, ModelSection, ServiceSection, StageConfig
from services.errors import StartupError
from services.families import load_family
from text_encoder_svc.rank import TextEncoderProgram
from vae_svc.rank import VaeProgram

PROGRAMS = {
    TextEncoderProgram: {"text_encoder", "tokenizer", "processor"},
    DitProgram: {"transformer", "scheduler"},
    VaeProgram: {"vae"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    load_family("qwen_image").tiny(folder, "edit", 0)
    return folder


def program(kind, folder: Path):
    config = StageConfig(
        service=ServiceSection(name="stage", port=0),
        model=ModelSection(name="m", source=str(folder), device="cpu"),
        engine=EngineSection(warmup=False),
    )
    return kind(config)


@pytest.mark.parametrize("kind", PROGRAMS, ids=lambda kind: kind.__name__)
def test_a_service_needs_no_folder_but_its_own(kind, whole, tmp_path):
    """And says of itself what it says beside the others: its component id is made of what it reads."""
    for folder in whole.iterdir():
        if folder.is_dir() and folder.name in PROGRAMS[kind]:
            shutil.copytree(folder, tmp_path / folder.name)
    shutil.copy(whole / "model_index.json", tmp_path)
    if kind is DitProgram:
        # How latents are scaled, by which pictures to edit come in: a few numbers, no weights.
        (tmp_path / "vae").mkdir()
        shutil.copy(whole / "vae/config.json", tmp_path / "vae")
    assert program(kind, tmp_path).describe() == program(kind, whole).describe()


@pytest.mark.parametrize("kind", PROGRAMS, ids=lambda kind: kind.__name__)
def test_a_service_without_its_weights_does_not_start(kind, whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    for name in PROGRAMS[kind] - {"scheduler", "tokenizer", "processor"}:
        shutil.rmtree(folder / name)
    with pytest.raises(StartupError):
        program(kind, folder)
