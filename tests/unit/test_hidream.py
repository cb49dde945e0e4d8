"""HiDream beside the library: experts, text, schedulers, VAE, previews, presets; what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

from lightloom.local import Local
from services.errors import InvalidRequest, StartupError
from services.families import family_of_pipeline, load_family
from services.families.hidream.conditions import TEXT_TOKENS
from services.families.hidream.dit import step_noise
from services.families.hidream.moe import MixtureOfExperts
from services.family import TextInput
from services.request import GenerationParams, resolve
from services.weights import ModelSource, open_source
from tests.oracle.harness import Subject, difference, equal, run
from tests.oracle.hidream import ROWS, call, open_pipeline, row_by_row, wish
from vae_svc.engine import VaeJob, to_pixels
from vae_svc.latent_rgb_fit import fit_latent_rgb

CPU = torch.device("cpu")
FAMILY = load_family("hidream")
FULL, DEV = ROWS
ALONE = {"branches": "serial", "max_batch": 1}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("full")
    FAMILY.tiny(made, "full", 0)
    return made


@pytest.fixture(scope="module")
def subject(folder):
    with torch.inference_mode():
        return Subject(FULL, folder)


def with_scheduler(folder, made, config: dict):
    """A copy of the model with another scheduler."""
    shutil.copytree(folder, made, dirs_exist_ok=True)
    (made / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((made / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (made / "model_index.json").write_text(json.dumps(index))
    return made


# ---- Experts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 37), (3, 20)])
def test_a_mixture_of_experts_equals_the_librarys_bit_for_bit(rows, tokens, dtype):
    torch.manual_seed(rows * tokens)
    library = MOEFeedForwardSwiGLU(48, 96, 4, 2).eval().to(dtype)
    hidden = torch.randn(rows, tokens, 48, dtype=dtype)
    expected = library(hidden)
    assert torch.equal(MixtureOfExperts(library)(hidden), expected)


def test_experts_without_tokens_and_one_with_all():
    torch.manual_seed(0)
    library = MOEFeedForwardSwiGLU(48, 96, 4, 2).eval()
    library.gate.weight.zero_()[[1, 3]] += 1.0
    hidden = torch.rand(1, 30, 48)
    expected = library(hidden)
    chosen, _, _ = library.gate(hidden)
    assert set(chosen.flatten().tolist()) == {1, 3}
    assert torch.equal(MixtureOfExperts(library)(hidden), expected)


# ---- Text ----------------------------------------------------------------------------------------------------------

PROMPTS = ("a red circle", "", "a photo of a large green square on a blue background, " * 8)


def test_text_equals_the_stock_pipelines_encoding_bit_for_bit(folder):
    pipeline = open_pipeline(folder, torch.float32)
    text = FAMILY.text.load(open_source(str(folder)), CPU, torch.float32)
    for prompt in PROMPTS:
        [ours] = FAMILY.text.encode(text, [TextInput(prompt)])
        t5, _, llama, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        theirs = {"t5": t5[0], "pooled": pooled[0]} | {f"llama/{layer}": llama[layer, 0] for layer in (0, 1, 3)}
        assert equal(ours, theirs), prompt
        assert len(ours["t5"]) == TEXT_TOKENS


def test_prompts_of_a_batch_are_encoded_as_alone(folder):
    text = FAMILY.text.load(open_source(str(folder)), CPU, torch.float32)
    together = FAMILY.text.encode(text, [TextInput(prompt) for prompt in PROMPTS])
    for prompt, ours in zip(PROMPTS, together, strict=True):
        assert difference(ours, FAMILY.text.encode(text, [TextInput(prompt)])[0]) <= 1e-5


def test_text_and_vae_services_need_no_weights_of_the_transformer(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    source = open_source(str(tmp_path))
    assert FAMILY.text.load(source, CPU, torch.float32).layers == [0, 1, 3]
    FAMILY.vae.load(source, CPU, torch.float32)
    with pytest.raises(StartupError):
        FAMILY.dit.load(source, CPU, torch.float32)


def test_random_encoders_tell_prompts_apart_and_repeat_themselves(folder):
    tiny = open_source(str(folder))
    parts = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "transformer")
    preset = {"model_index": {"_class_name": "HiDreamImagePipeline"}} | {part: tiny.config(part) for part in parts}
    source = ModelSource(spec="random:1", family="hidream", variant="full", seed=1, preset=preset)
    text = FAMILY.text.load(source, CPU, torch.float32)
    first, second, again, long = FAMILY.text.encode(
        text, [TextInput(prompt) for prompt in ("a cat", "a dog", "a cat", "a cat " * 200)]
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (second, long):
        assert not any(torch.equal(first[name], other[name]) for name in first)
        assert {name: tensor.shape for name, tensor in other.items()} == {n: t.shape for n, t in first.items()}


# ---- Denoiser ------------------------------------------------------------------------------------------------------


def test_the_stock_pipelines_batch_of_two_branches_is_within_tolerance(folder, subject):
    params = subject.params(FULL.wishes[0])
    engine = subject.engine(**ALONE)
    engine.admit(subject.job("a", params))
    pipeline = open_pipeline(folder, torch.float32)
    assert difference(run(engine, [])["a"], {"latents": call(pipeline, params)}) <= 1e-4


@pytest.mark.parametrize(
    "config", [{"shift": 3.0}, {"use_dynamic_shifting": True}], ids=["fixed shift", "shift by tokens"]
)
def test_the_euler_scheduler_equals_the_stock_pipeline_bit_for_bit(folder, tmp_path, config):
    config |= {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    subject = Subject(FULL, with_scheduler(folder, tmp_path, config))
    params = subject.params(FULL.wishes[0])
    engine = subject.engine(**ALONE)
    engine.admit(subject.job("a", params))
    assert equal(run(engine, [])["a"], subject.stock(params))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"_class_name": "DDIMScheduler"}, "served are FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "UniPCMultistepScheduler"}, "use_flow_sigmas"),
        (FAMILY.presets["hidream-i1-full"]["scheduler"] | {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"_class_name": "FlowMatchLCMScheduler", "scale_factors": [0.5]}, "scale_factors"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, "stochastic_sampling"),
    ],
)
def test_schedulers_that_cannot_be_served_are_refused(folder, tmp_path, config, reason):
    source = open_source(str(with_scheduler(folder, tmp_path, config)))
    with pytest.raises(StartupError, match=reason):
        FAMILY.dit.load(source, CPU, torch.float32)


def test_fresh_noise_follows_from_seed_and_step_alone():
    draws = [torch.randn(8, generator=step_noise(seed, step)) for seed in (1, 2) for step in (0, 1, 2)]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)
    assert torch.equal(draws[4], torch.randn(8, generator=step_noise(2, 1)))
    assert not torch.equal(draws[0], torch.randn(8, generator=torch.Generator().manual_seed(1)))


def test_conditions_of_another_form_are_refused(subject):
    params = subject.params(FULL.wishes[0])
    good = subject.job("a", params).conditions
    assert set(good) == {
        f"{branch}/{name}"
        for branch in ("positive", "negative")
        for name in ("t5", "pooled", "llama/0", "llama/1", "llama/3")
    }
    bad = {
        "missing": {name: tensor for name, tensor in good.items() if name != "negative/llama/1"},
        "another length": good | {"positive/t5": good["positive/t5"][:, :77]},
        "another width": good | {"positive/pooled": good["positive/pooled"][:, :-1]},
        "whole numbers": good | {"positive/llama/3": good["positive/llama/3"].long()},
    }
    for conditions in bad.values():
        with pytest.raises(InvalidRequest, match="condition"):
            FAMILY.dit.prepare(subject.dit, "a", params, conditions)


def test_more_tokens_than_the_model_knows_are_refused(subject):
    params = subject.params(wish("a", 1, 2, (512, 512)))
    with pytest.raises(InvalidRequest, match="1024 tokens: at most 196"):
        FAMILY.dit.prepare(subject.dit, "a", params, {})


def test_example_conditions_are_those_that_prepare_wants(subject):
    for guidance, branches in ((4.0, ("positive", "negative")), (1.0, ("positive",))):
        params = replace(subject.params(FULL.wishes[0]), guidance=guidance)
        conditions = FAMILY.dit.example_conditions(subject.dit, params, 23)
        state = FAMILY.dit.prepare(subject.dit, "a", params, conditions)
        assert FAMILY.dit.branches(subject.dit, state) == branches


# ---- Pictures ------------------------------------------------------------------------------------------------------


def test_a_picture_equals_the_stock_pipelines_pixel_for_pixel(folder, subject):
    params = subject.params(FULL.wishes[0])
    pipeline = open_pipeline(folder, torch.float32)
    row_by_row(pipeline)
    [frames] = FAMILY.vae.decode(
        FAMILY.vae.load(open_source(str(folder)), CPU, torch.float32), [subject.stock(params)], params
    )
    assert frames.shape == (1, 1, 3, params.height, params.width)
    [picture] = call(pipeline, params, output_type="pt")
    assert torch.equal((frames[0, 0] / 2 + 0.5).clamp(0, 1), picture)
    assert to_pixels(frames).shape == (1, 1, params.height, params.width, 3)


def test_latents_of_another_shape_fail_in_the_vae(subject):
    params = subject.params(FULL.wishes[0])
    for latents in (torch.zeros(1, 16, 8, 8), torch.zeros(1, 16, 10, 8).long()):
        subject.vae.submit(VaeJob("a", params, {"latents": latents}))
        [result] = subject.vae.tick()
        assert isinstance(result.error, InvalidRequest)


def test_picture_latents_undo_what_decode_does_to_latents(folder):
    vae = FAMILY.vae.load(open_source(str(folder)), CPU, torch.float32)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = FAMILY.vae.picture_latents(vae, pixels)
    assert latents.shape == (2, 16, 4, 6)
    unscaled = latents / vae.module.config.scaling_factor + vae.module.config.shift_factor
    torch.testing.assert_close(unscaled, vae.module.encode(pixels).latent_dist.mode())
    assert fit_latent_rgb(FAMILY.vae, vae) is not None


def test_a_preview_is_what_one_step_would_have_made(folder, tmp_path):
    subject = Subject(FULL, with_scheduler(folder, tmp_path, {"_class_name": FlowMatchEulerDiscreteScheduler.__name__}))
    part, model = FAMILY.dit, subject.dit
    previews = []
    for steps in (1, 7):
        params = subject.params(replace(FULL.wishes[0], steps=steps, guidance=1.0))
        state = part.prepare(model, "a", params, subject.job("a", params).conditions)
        prediction = torch.randn(state.latents.shape, generator=torch.Generator().manual_seed(0))
        part.advance(model, state, prediction)
        previews.append(part.preview_latents(model, state, prediction))
        if steps == 1:
            assert torch.equal(previews[0], state.latents)
    torch.testing.assert_close(*previews)


# ---- Models --------------------------------------------------------------------------------------------------------


def test_models_are_told_apart_and_have_their_authors_defaults():
    index = {"scheduler": ["diffusers", "FlowMatchLCMScheduler"]}
    assert family_of_pipeline("HiDreamImagePipeline", {}) == ("hidream", "full")
    assert family_of_pipeline("HiDreamImagePipeline", index) == ("hidream", "dev")
    defaults = {}
    for preset, config in FAMILY.presets.items():
        source = open_source("random:1", family="hidream", preset=preset)
        limits = FAMILY.variants[source.variant].limits
        scheduler = config["scheduler"]
        shift = scheduler.get("shift") or scheduler["flow_shift"]
        defaults[preset] = (source.variant, limits.default_steps, limits.default_guidance, shift)
    assert defaults == {
        "hidream-i1-full": ("full", 50, 5.0, 3.0),
        "hidream-i1-dev": ("dev", 28, 1.0, 6.0),
        "hidream-i1-fast": ("fast", 16, 1.0, 3.0),
    }


def test_sizes_end_at_a_megapixel():
    limits = FAMILY.variants["full"].limits
    ask = GenerationParams(model="m", prompt="p", width=1360, height=768)
    assert resolve(ask, limits, seed=0).width == 1360
    with pytest.raises(InvalidRequest, match="pixels"):
        resolve(replace(ask, height=784), limits, seed=0)


@pytest.mark.parametrize("variant", FAMILY.variants)
def test_tiny_models_are_small_and_load_in_the_stock_pipeline(tmp_path, variant):
    FAMILY.tiny(tmp_path, variant, 0)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 5e6
    assert open_source(str(tmp_path)).variant == variant
    pipeline = HiDreamImagePipeline.from_pretrained(tmp_path)
    assert len(pipeline.transformer.config.llama_layers) == 4


def test_a_picture_without_a_cluster(tmp_path):
    FAMILY.tiny(tmp_path, "dev", 0)
    with Local(str(tmp_path), width=96, height=64, steps=2) as model:
        result = model.generate("a cat")
    assert (result.mime, result.width, result.height) == ("image/png", 96, 64)
