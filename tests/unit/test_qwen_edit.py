"""Qwen-Image-Edit beyond the oracle's table: sizes of pictures, batches of prompts with pictures, what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from torch._dynamo.testing import CompileCounter

from dit_svc.engine import DenoiseJob
from services.errors import InvalidRequest, StartupError
from services.families.qwen_image import FAMILY
from services.families.qwen_image.cut import Batch
from services.families.qwen_image.pictures import scaled
from services.families.qwen_image.presets import SCHEDULER
from services.family import TextInput
from services.media import decode_image
from services.request import resolve
from services.weights import ModelSource, open_source
from tests.oracle.harness import CPU, Subject, difference, make_folder, relative, run
from tests.oracle.qwen_image import ROWS, edit_pipeline, edited, give_token_types, picture
from text_encoder_svc.engine import TextEngine

[ROW] = [row for row in ROWS if str(row) == "qwen_image-edit"]
FLOAT = torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(ROW, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def subject(folder):
    with torch.inference_mode():
        return Subject(ROW, folder)


@pytest.fixture(scope="module")
def text(folder):
    return FAMILY.text.load(open_source(str(folder)), CPU, FLOAT)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def frames(width: int, height: int, seed: int = 1):
    return decode_image(picture(width, height, seed))


@pytest.mark.parametrize("area_px", [1024 * 1024, 384 * 384, 64 * 64])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (64, 64), (640, 480), (333, 1000), (1999, 1501), (40, 39)])
def test_pictures_get_the_stock_size(area_px, width, height):
    expected = calculate_dimensions(area_px, width / height)[:2]
    assert scaled(np.zeros((1, height, width, 3), np.uint8), area_px).size == expected


@pytest.mark.parametrize(("width", "height"), [(2000, 2), (1, 300), (5000, 24)])
def test_a_picture_that_is_all_length_is_refused(width, height):
    with pytest.raises(InvalidRequest, match=f"{width}x{height}"):
        scaled(np.zeros((1, height, width, 3), np.uint8), 1024 * 1024)


def test_each_part_reads_its_own_folders_only(folder, tmp_path):
    needs = {
        "text": ("tokenizer", "processor", "text_encoder"),
        "vae": ("vae",),
        "dit": ("transformer", "scheduler"),
    }
    for part, names in needs.items():
        alone = tmp_path / part
        for name in names:
            shutil.copytree(folder / name, alone / name)
        shutil.copy(folder / "model_index.json", alone)
        if part == "dit":
            (alone / "vae").mkdir()
            shutil.copy(folder / "vae/config.json", alone / "vae")
        assert getattr(FAMILY, part).load(open_source(str(alone)), CPU, FLOAT)


def test_prompts_with_other_pictures_or_none_share_a_batch(text):
    inputs = [
        TextInput("make it red", (frames(90, 50),)),
        TextInput("a photo of a large green square on a blue background", (frames(40, 200, 2),)),
        TextInput("dog"),
        TextInput("dog", (frames(64, 64, 3), frames(30, 90, 4))),
    ]
    together = FAMILY.text.encode(text, inputs)
    for batched, item in zip(together, inputs, strict=True):
        [alone] = FAMILY.text.encode(text, [item])
        assert relative(batched["text"], alone["text"]) <= 1e-5
    assert len({tensors["text"].shape for tensors in together}) == 4


def test_rows_and_columns_of_the_picture_count(text, folder):
    """The stock pipeline loses them under transformers 5 (see give_token_types); once it does not, drop that."""
    item = TextInput("make it red", (frames(90, 50),))
    [ours] = FAMILY.text.encode(text, [item])
    image = scaled(item.images[0], 96 * 64)
    pipeline = edit_pipeline(folder, FLOAT)
    dropped, _ = pipeline.encode_prompt(item.text, image=image)
    give_token_types(pipeline)
    kept, _ = pipeline.encode_prompt(item.text, image=image)
    assert torch.equal(ours["text"], kept[0])
    assert relative(ours["text"], dropped[0]) > 1e-3


def test_the_librarys_own_vae_path_differs_in_the_last_bits_only(subject, folder):
    params = subject.params(ROW.wishes[0])
    pipeline = edit_pipeline(folder, FLOAT)
    give_token_types(pipeline)
    engine = subject.engine(branches="serial")
    engine.admit(subject.job("a", params))
    assert difference(run(engine, [])["a"], {"latents": edited(pipeline, folder, params)}) <= 1e-5


def test_a_prompt_with_the_image_mark_fails_alone(text):
    engine = TextEngine(FAMILY.text, text, max_batch=8, cache_bytes=0)
    wish = replace(ROW.wishes[0], guidance=1.0)
    limits = FAMILY.variants["edit"].limits
    engine.submit("bad", resolve(replace(wish, prompt="make <|image_pad|> red"), limits, seed=0))
    engine.submit("good", resolve(wish, limits, seed=0))
    bad, good = engine.tick()
    assert isinstance(bad.error, InvalidRequest)
    assert good.error is None
    assert good.tensors["positive/text"].shape[2] == 48


LATENTS = torch.zeros(1, 16, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image/0": None}, "'image/0' is missing"),
        ({"image/0": LATENTS[:, :4]}, r"must be \[1, 16, h, w\]"),
        ({"image/0": LATENTS[:, :, :7]}, "even sides"),
        ({"image/0": LATENTS[:, :, :0]}, "even sides"),
        ({"image/0": LATENTS.long()}, "floating-point"),
        ({"image/0": LATENTS.repeat(2, 1, 1, 1)}, r"must be \[1, 16, h, w\]"),
        ({"image/7": LATENTS}, "'image/1' is missing"),
        ({"positive/text": torch.zeros(1, 4095, 48)}, "the text has 4095 tokens: at most 4094 fit"),
    ],
)
def test_wrong_conditions_are_refused(subject, changes, message):
    params = subject.params(replace(ROW.wishes[0], guidance=1.0))
    conditions = {"positive/text": torch.zeros(1, 5, 48), "image/0": LATENTS} | changes
    engine = subject.engine()
    with pytest.raises(InvalidRequest, match=message):
        engine.admit(DenoiseJob("x", params, {name: value for name, value in conditions.items() if value is not None}))
    assert not engine.busy


def test_pictures_of_other_shapes_take_turns(subject):
    """One output size: whose input pictures have one shape share forwards, others do not."""
    engine = subject.engine(max_batch=8)
    for name, size in {"a": (90, 50), "b": (88, 49), "c": (50, 90)}.items():
        wish = replace(ROW.wishes[0], inputs=(picture(*size, seed=1),))
        engine.admit(subject.job(name, subject.params(wish)))
    events: list = []
    run(engine, events)
    assert {event.request_id: event.batch for event in events if hasattr(event, "batch")} == {"a": 2, "b": 2, "c": 1}


def test_random_weights_of_a_preset_edit_too(folder):
    """`random:SEED` has no tokenizer and no processor files."""
    configs = {name: open_source(str(folder)).config(name) for name in ("text_encoder", "transformer", "vae")}
    preset = {
        "model_index": {"_class_name": "QwenImageEditPipeline", "vision_area_px": 64 * 64, "latent_area_px": 64 * 64},
        "processor": FAMILY.presets["qwen-image-edit"]["processor"],
        "scheduler": SCHEDULER,
        **configs,
    }
    source = ModelSource("random:0", "qwen_image", "edit", seed=0, preset=preset)
    text = FAMILY.text.load(source, CPU, FLOAT)
    inputs = [TextInput("make it red", (frames(90, 50, seed),)) for seed in (1, 2)]
    one, other = FAMILY.text.encode(text, inputs)
    assert one["text"].shape == other["text"].shape
    assert not torch.equal(one["text"], other["text"])
    dit = FAMILY.dit.load(source, CPU, FLOAT)
    assert dit.variant == "edit"


def test_a_transformer_that_is_none_of_the_variants_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    config = tmp_path / "model/transformer/config.json"
    config.write_text(config.read_text().replace('"zero_cond_t": false', '"zero_cond_t": true'))
    with pytest.raises(StartupError, match="zero_cond_t does not fit a model that makes edit"):
        FAMILY.dit.load(open_source(str(tmp_path / "model")), CPU, FLOAT)


def test_a_folder_tells_2511_from_2509_by_its_transformer(tmp_path):
    for variant in ("edit_plus", "edit_2511"):
        FAMILY.tiny(tmp_path / variant, variant, 0)
        assert open_source(str(tmp_path / variant)).variant == variant
    assert open_source("random:0", family="qwen_image", preset="qwen-image-edit-2511").variant == "edit_2511"
    assert open_source("random:0", family="qwen_image", preset="qwen-image-edit-2509").variant == "edit_plus"


def test_the_area_is_part_of_the_component(folder, tmp_path):
    before = open_source(str(folder)).component_id("vae", ("vae",))
    shutil.copytree(folder, tmp_path / "model")
    index = tmp_path / "model/model_index.json"
    index.write_text(index.read_text().replace('"latent_area_px": 6144', '"latent_area_px": 8192'))
    assert open_source(str(tmp_path / "model")).component_id("vae", ("vae",)) != before


def test_two_graphs_serve_blocks_with_pictures_at_timestep_0(tmp_path):
    FAMILY.tiny(tmp_path, "edit_2511", 0)
    module = FAMILY.dit.load(open_source(str(tmp_path)), CPU, FLOAT).modules[""]
    blocks = FAMILY.dit.blocks(module)
    torch._dynamo.reset()
    counter = CompileCounter()
    [cls] = FAMILY.dit.plan.block_classes
    forward = torch.compile(cls.forward, backend=counter, fullgraph=True, dynamic=True)
    for block in blocks:
        block.module.forward = MethodType(forward, block.module)

    def run(rows: int, text: int, sides: tuple[int, int], pictures: int) -> torch.Tensor:
        grids = ((1, *sides), *[(1, 3, 5)] * pictures)
        own = sides[0] * sides[1]
        batch = Batch(
            latents=torch.randn(rows, own + 15 * pictures, 64),
            timestep=torch.rand(rows),
            text=torch.randn(rows, text, 48),
            filling=None,
            grids=grids,
            num_image_tokens=own,
        )
        streams = FAMILY.dit.embed(module, batch)
        for block in blocks:
            streams = block.run(streams)
        return FAMILY.dit.head(module, streams)

    with torch.fx.experimental._config.patch(use_duck_shape=False):
        for rows in (1, 2):
            run(rows, 23, (4, 6), 1)
        graphs = counter.frame_count
        for rows, text, sides, pictures in ((3, 50, (4, 4), 2), (1, 77, (7, 9), 3), (4, 12, (5, 6), 1)):
            assert run(rows, text, sides, pictures).isfinite().all()
    torch._dynamo.reset()
    assert counter.frame_count == graphs == 2
