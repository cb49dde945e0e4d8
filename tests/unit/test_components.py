"""Each service reads its own components only: without the others' weights it starts and says what it is."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dit_svc.rank import DitProgram
from protos import dit_pb2, text_encoder_pb2, vae_pb2
from services.channel import FrameQueue, OpenCall
from services.config import EngineSection, ModelSection, ServiceSection, StageConfig
from services.errors import InvalidRequest, StartupError
from services.families import load_family
from services.rank_process import Call
from services.request import GenerationParams, Media, resolve
from services.tensor_wire import end_message
from services.tensors import BundleReader
from services.wire import params_to_proto
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


def first_message(kind, **changes: object) -> tuple[str, bytes]:
    """A method and the start of a call of it."""
    clip = Media("image/png", b"", "image")
    wish = GenerationParams(model="m", prompt="a", width=64, height=64, steps=4, inputs=(clip,))
    params = replace(resolve(wish, load_family("qwen_image").variants["edit"].limits, seed=0), **changes)
    asked = params_to_proto(replace(params, inputs=()))
    if kind is TextEncoderProgram:
        return "Encode", text_encoder_pb2.EncodeRequest(params=asked).SerializeToString()
    if kind is DitProgram:
        return "Denoise", dit_pb2.DenoiseRequest(
            start=dit_pb2.DenoiseStart(params=asked, num_bundles=1)
        ).SerializeToString()
    return "Decode", vae_pb2.DecodeRequest(start=vae_pb2.DecodeStart(params=asked)).SerializeToString()


@pytest.mark.parametrize("kind", PROGRAMS, ids=lambda kind: kind.__name__)
def test_a_rank_refuses_what_no_model_with_its_weights_could_do(kind, whole, caplog):
    """Whoever called it: a gateway has checked what it sends."""
    served = program(kind, whole)

    def begin(**changes: object) -> None:
        method, message = first_message(kind, **changes)
        send(method, message)

    def send(method: str, message: bytes) -> None:
        call = Call(1, OpenCall(method, "r", "", 0.0), FrameQueue(1 << 20))
        served.opened(call)
        served.message(call, message)

    with pytest.raises(InvalidRequest, match="cannot be read: DecodeError"):
        send(first_message(kind)[0], b"\xff\xff\xff garbage")
    assert "Traceback" in caplog.text

    # Another model with these weights may allow that.
    begin(steps=500, guidance=100.0, width=8192)
    wrong = {"num_frames": 5, "width": 0, "height": 72, "fps": math.nan, "guidance": math.inf, "output_format": "wav"}
    for name, value in [*wrong.items(), ("num_frames", 0), ("quality", 1000)]:
        with pytest.raises(InvalidRequest, match=name) as caught:
            begin(**{name: value})
        assert caught.value.param == name


@pytest.mark.parametrize("kind", [DitProgram, VaeProgram], ids=lambda kind: kind.__name__)
def test_a_bug_behind_a_message_is_not_told_as_the_peers_fault(kind, whole, monkeypatch):
    served = program(kind, whole)
    call = Call(1, OpenCall(first_message(kind)[0], "r", "", 0.0), FrameQueue(1 << 20))
    served.opened(call)
    monkeypatch.setattr(BundleReader, "feed", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        served.message(call, end_message())


@pytest.mark.parametrize("kind", PROGRAMS, ids=lambda kind: kind.__name__)
def test_a_service_without_its_weights_does_not_start(kind, whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    for name in PROGRAMS[kind] - {"scheduler", "tokenizer", "processor"}:
        shutil.rmtree(folder / name)
    with pytest.raises(StartupError):
        program(kind, folder)
