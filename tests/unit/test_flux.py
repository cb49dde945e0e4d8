"""FLUX beside its stock pipeline: text, true guidance, VAE, previews, presets; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from dit_svc.engine import DenoiseJob, Stepped
from gateway.http_schema import GenerationRequest, ImageRequest
from lightloom.local import Local
from protos import gateway_pb2
from services.errors import InvalidRequest, StartupError
from services.families import load_family
from services.families.flux.latents import pack, unpack
from services.family import TextInput
from services.request import GenerationParams, resolve
from services.weights import ModelSource, open_source
from services.wire import limits_from_proto, limits_to_proto
from tests.oracle.flux import ROWS, TEXT_TOKENS, call
from tests.oracle.harness import Subject, difference, equal, run
from vae_svc.latent_rgb_fit import fit_latent_rgb

CPU = torch.device("cpu")
FAMILY = load_family("flux")
BY_VARIANT = {row.variant: row for row in ROWS}
VARIANTS = tuple(BY_VARIANT)
ALONE = {"branches": "serial", "max_batch": 1}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {variant: tmp_path_factory.mktemp(variant) for variant in VARIANTS}
    for variant, folder in made.items():
        FAMILY.tiny(folder, variant, 0)
    return made


@pytest.fixture(scope="module")
def subjects(folders):
    with torch.inference_mode():
        return {variant: Subject(BY_VARIANT[variant], folder) for variant, folder in folders.items()}


# ---- Guidance ------------------------------------------------------------------------------------------------------


def test_dev_follows_its_guidance_and_schnell_has_none(subjects):
    for variant, differs in (("dev", True), ("schnell", False)):
        subject, made = subjects[variant], []
        for guidance in (1.5, 6.0):
            engine = subject.engine(**ALONE)
            engine.admit(subject.job("a", subject.params(replace(BY_VARIANT[variant].wishes[0], guidance=guidance))))
            made.append(run(engine, [])["a"])
        assert equal(*made) != differs, variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_guidance_alone_takes_one_branch_and_no_negative_prompt_is_encoded(subjects, variant):
    subject = subjects[variant]
    wish = replace(BY_VARIANT[variant].wishes[0], guidance=7.0, negative_prompt="blurred")
    misses = subject.text.metrics()["text_cache_misses_total"]
    job = subject.job("a", subject.params(wish))
    assert set(job.conditions) == {"positive/text", "positive/pooled"}
    assert subject.text.metrics()["text_cache_misses_total"] == misses + 1
    state = FAMILY.dit.prepare(subject.dit, "a", job.params, job.conditions)
    assert FAMILY.dit.branches(subject.dit, state) == ("positive",)
    both = subject.job("b", subject.params(replace(wish, guidance_2=2.0)))
    assert set(both.conditions) == {
        f"{branch}/{name}" for branch in ("positive", "negative") for name in ("text", "pooled")
    }
    # Who asks for nothing gets one branch too.
    assert FAMILY.text.branches(subject.params(GenerationParams(model="m", prompt="a"))) == ("positive",)


def test_true_guidance_in_one_batch_with_others_is_the_stock_pipelines(subjects):
    subject = subjects["dev"]
    wishes = [
        replace(wish, guidance_2=scale, negative_prompt=text)
        for wish, scale, text in zip(BY_VARIANT["dev"].together, (2.0, 3.5, 1.2), ("", "blue", "a cat"), strict=True)
    ]
    engine, events = subject.engine(branches="rows", max_batch=8), []
    for index, wish in enumerate(wishes):
        engine.admit(subject.job(str(index), subject.params(wish)))
        events += engine.tick()
    results = run(engine, events)
    assert max(event.batch for event in events if isinstance(event, Stepped)) == 3
    for index, wish in enumerate(wishes):
        params = subject.params(wish)
        assert difference(results[str(index)], subject.stock(params)) <= 1e-4
        without = subject.stock(replace(params, guidance_2=1.0))
        assert difference(results[str(index)], without) > 1e-3


def test_the_second_scale_keeps_its_default_when_only_guidance_is_given():
    limits = FAMILY.variants["dev"].limits
    assert limits_from_proto(limits_to_proto(limits)) == limits
    wish = GenerationParams(model="m", prompt="a")
    plain, told = resolve(wish, limits, seed=0), resolve(replace(wish, guidance=6.0), limits, seed=0)
    assert (plain.guidance, plain.guidance_2, plain.steps) == (3.5, 1.0, 28)
    assert (told.guidance, told.guidance_2) == (6.0, 1.0)
    body = {"prompt": "a", "guidance_2": 2.5}
    info = gateway_pb2.ModelInfo(name="m", limits=limits_to_proto(limits))
    for asked in (ImageRequest(**body).params(info), GenerationRequest(**body).params("m")):
        assert resolve(asked, limits, seed=0).guidance_2 == 2.5
    fast = resolve(wish, FAMILY.variants["schnell"].limits, seed=0)
    assert (fast.guidance, fast.guidance_2, fast.steps) == (0.0, 1.0, 4)


# ---- Text ----------------------------------------------------------------------------------------------------------

LONG = "a red circle, " * 100


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_is_the_stock_pipelines_with_its_filling(folders, variant):
    pipeline = FluxPipeline.from_pretrained(folders[variant], dtype=torch.float32)
    model = FAMILY.text.load(open_source(str(folders[variant])), CPU, torch.float32)
    for prompt in ("a red circle", "", LONG):
        text, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=TEXT_TOKENS[variant])
        [ours] = FAMILY.text.encode(model, [TextInput(prompt)])
        assert ours["text"].shape == (TEXT_TOKENS[variant], 40)
        assert torch.equal(ours["text"], text[0])
        assert torch.equal(ours["pooled"], pooled[0])
    prompts = ["a dog", LONG, "b"]
    together = FAMILY.text.encode(model, [TextInput(prompt) for prompt in prompts])
    for prompt, row in zip(prompts, together, strict=True):
        [alone] = FAMILY.text.encode(model, [TextInput(prompt)])
        assert difference(row, alone) <= 1e-5
        # A cached row holds its own bytes only.
        assert row["text"].untyped_storage().nbytes() == row["text"].nbytes


def test_a_text_encoder_that_cannot_know_its_model_does_not_start(tmp_path):
    FAMILY.tiny(tmp_path, "dev", 0)
    (tmp_path / "transformer" / "config.json").unlink()
    with pytest.raises(StartupError, match=r"transformer.config\.json"):
        FAMILY.text.load(open_source(str(tmp_path)), CPU, torch.float32)


def test_random_weights_encode_without_tokenizers(folders):
    preset = {
        name: json.loads((folders["dev"] / name / "config.json").read_text())
        for name in ("text_encoder", "text_encoder_2", "transformer")
    }
    source = ModelSource("random:1", "flux", "dev", seed=1, preset=preset)
    model = FAMILY.text.load(source, CPU, torch.float32)
    first, same, long = FAMILY.text.encode(model, [TextInput(text) for text in ("a dog", "a dog", LONG)])
    assert equal(first, same)
    assert not equal(first, long)
    assert (first["text"].shape, first["pooled"].shape) == ((512, 40), (24,))


# ---- Conditions and batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"positive/text": torch.zeros(1, 5, 7)}, r"\[1, 5, 7\]"),
        ({"positive/text": torch.zeros(2, 5, 40)}, r"\[2, 5, 40\]"),
        ({"positive/text": torch.zeros(1, 513, 40)}, "T <= 512"),
        ({"positive/text": torch.zeros(1, 5, 40, dtype=torch.int64)}, "int64"),
        ({"positive/pooled": torch.zeros(1, 25)}, r"\[1, 24\]"),
        ({"positive/pooled": None}, "'positive/pooled' is missing"),
        ({"negative/pooled": None}, "'negative/pooled' is missing"),
        ({"negative/text": torch.zeros(1, 6, 40)}, "the same number"),
    ],
)
def test_wrong_conditions_are_refused(subjects, changes, says):
    subject = subjects["dev"]
    params = subject.params(replace(BY_VARIANT["dev"].wishes[0], guidance_2=2.0))
    good = {
        f"{branch}/{name}": torch.zeros(1, *shape)
        for branch in ("positive", "negative")
        for name, shape in (("text", (5, 40)), ("pooled", (24,)))
    }
    engine = subject.engine()
    engine.admit(DenoiseJob("good", params, good))
    bad = {name: tensor for name, tensor in (good | changes).items() if tensor is not None}
    with pytest.raises(InvalidRequest, match=says):
        engine.admit(DenoiseJob("bad", params, bad))


def test_texts_of_different_lengths_do_not_share_a_forward(subjects):
    subject = subjects["dev"]
    params = subject.params(BY_VARIANT["dev"].wishes[0])
    keys = []
    for tokens in (5, 6, 5):
        conditions = FAMILY.dit.example_conditions(subject.dit, params, tokens)
        state = FAMILY.dit.prepare(subject.dit, "a", params, conditions)
        keys.append(FAMILY.dit.batch_key(subject.dit, state))
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ("vae/config.json", {"latent_channels": 4}, "64 channels"),
    ],
)
def test_a_folder_that_cannot_be_served_stops_the_start(tmp_path, file, changes, says):
    FAMILY.tiny(tmp_path, "dev", 0)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(StartupError, match=says):
        FAMILY.dit.load(open_source(str(tmp_path)), CPU, torch.float32)


# ---- VAE and previews ----------------------------------------------------------------------------------------------


def test_decoded_pictures_are_the_stock_pipelines(folders, subjects):
    pipeline = FluxPipeline.from_pretrained(folders["schnell"], dtype=torch.float32)
    params = subjects["schnell"].params(BY_VARIANT["schnell"].wishes[0])
    latents = call(pipeline, params, 256)
    theirs = call(pipeline, params, 256, output_type="pt")
    vae = FAMILY.vae.load(open_source(str(folders["schnell"])), CPU, torch.float32)
    [decoded] = FAMILY.vae.decode(vae, [{"latents": latents}], params)
    assert decoded.shape == (1, 1, 3, params.height, params.width)
    assert torch.equal((decoded[:, 0] * 0.5 + 0.5).clamp(0, 1), theirs)
    [again] = FAMILY.vae.decode(vae, [{"latents": -latents}, {"latents": latents}], params)
    assert (again[1] - decoded[0]).abs().max() <= 1e-5 * decoded.abs().max()
    with pytest.raises(InvalidRequest, match="of shape"):
        FAMILY.vae.decode(vae, [{"latents": latents}], replace(params, height=params.height + 16))
    with pytest.raises(InvalidRequest, match="no input pictures"):
        FAMILY.vae.encode(vae, [], params)


def test_pictures_become_the_latents_that_decode_to_them(folders):
    vae = FAMILY.vae.load(open_source(str(folders["dev"])), CPU, torch.float32)
    pixels = torch.rand(2, 3, 64, 96) * 2 - 1
    mode = vae.module.encode(pixels).latent_dist.mode()
    latents = FAMILY.vae.picture_latents(vae, pixels)
    assert latents.shape == (2, 16, 8, 12)
    wish = GenerationParams(model="m", prompt="a", width=96, height=64)
    params = resolve(wish, FAMILY.variants["dev"].limits, seed=0)
    [decoded] = FAMILY.vae.decode(vae, [{"latents": row[None]} for row in pack(latents)], params)
    theirs = vae.module.decode(mode, return_dict=False)[0]
    assert (decoded[:, 0] - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    fit = fit_latent_rgb(FAMILY.vae, vae)
    assert (fit.weight.shape, fit.bias.shape) == ((16, 3), (3,))


def test_packed_latents_are_the_stock_pipelines_layout():
    latents = torch.randn(2, 16, 8, 12)
    packed = FluxPipeline._pack_latents(latents, 2, 16, 8, 12)
    assert torch.equal(pack(latents), packed)
    assert torch.equal(unpack(packed, (4, 6)), latents)


def test_the_last_preview_is_the_picture_itself(subjects):
    subject = subjects["dev"]
    params = subject.params(BY_VARIANT["dev"].wishes[0])
    state = FAMILY.dit.prepare(subject.dit, "a", params, subject.job("a", params).conditions)
    noise = unpack(state.latents, (params.height // 16, params.width // 16))
    prediction = torch.randn_like(state.latents)
    FAMILY.dit.advance(subject.dit, state, prediction)
    # From pure noise the estimate of a straight path is noise less velocity, whatever the step's length.
    velocity = unpack(prediction, (params.height // 16, params.width // 16))
    estimate = FAMILY.dit.preview_latents(subject.dit, state, prediction)
    assert estimate.shape == (1, 16, params.height // 8, params.width // 8)
    assert (estimate - (noise - velocity)).abs().max() <= 1e-5
    while not state.done:
        FAMILY.dit.advance(subject.dit, state, prediction)
    last = FAMILY.dit.preview_latents(subject.dit, state, prediction)
    assert torch.equal(pack(last), state.latents)


# ---- Presets, the tiny model, the whole ----------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "transformer"), [("flux1-dev", 11.901), ("flux1-schnell", 11.891)])
def test_presets_have_the_published_sizes(preset, transformer):
    source = open_source("random:1", family="flux", preset=preset)
    assert f"flux1-{source.variant}" == preset
    with torch.device("meta"):
        modules = {
            "transformer": FluxTransformer2DModel.from_config(source.config("transformer")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(source.config("text_encoder"))),
            "text_encoder_2": T5EncoderModel(T5Config.from_dict(source.config("text_encoder_2"))),
            "vae": AutoencoderKL.from_config(source.config("vae")),
        }
    published = {"transformer": transformer, "text_encoder": 0.12306, "text_encoder_2": 4.7623, "vae": 0.08382}
    for component, expected in published.items():
        count = sum(parameter.numel() for parameter in modules[component].parameters()) / 1e9
        assert abs(count - expected) <= 0.0005 * expected, (component, count)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tiny_model_is_small_and_known_for_what_it_is(folders, variant):
    folder = folders[variant]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 5_000_000
    source = open_source(str(folder))
    assert (source.family, source.variant) == ("flux", variant)
    model = FAMILY.dit.load(source, CPU, torch.float32)
    assert len(FAMILY.dit.blocks(model.modules[""])) >= 4
    heads = model.modules[""].config[FAMILY.dit.plan.heads]
    assert heads % 2 == 0
    assert heads % 4


def test_a_picture_without_a_cluster(folders):
    with Local(str(folders["schnell"]), width=96, height=64) as model:
        result = model.generate("a cat")
    assert (result.mime, result.width, result.height) == ("image/png", 96, 64)
