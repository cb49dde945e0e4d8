"""Wan beside its stock pipeline: both experts under either scheduler, checkpoints on the wire, VAE, text, presets."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import av
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from safetensors.torch import load_file, save_file
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from dit_svc.checkpoint import restore_state, save_state
from dit_svc.engine import Checkpointed, DenoiseJob, Stepped
from lightloom.local import Local
from services.errors import InvalidRequest, StartupError
from services.families import load_family
from services.families.wan.text import clean
from services.family import TextInput
from services.media import decode_inputs
from services.request import GenerationParams, resolve
from services.tensor_wire import frame_of
from services.tensors import Bundle, BundleReader, bundle_frames
from services.weights import ModelSource, open_source
from tests.oracle.harness import Subject, difference, equal, run
from tests.oracle.wan import ROWS, picture, picture_pipeline, pictures_of

CPU = torch.device("cpu")
FAMILY = load_family("wan")
BY_VARIANT = {row.variant: row for row in reversed(ROWS)}
ALONE = {"branches": "serial", "max_batch": 1}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny models, and the two experts once more with the Euler scheduler."""
    made = {variant: tmp_path_factory.mktemp(variant) for variant in FAMILY.variants}
    for variant, folder in made.items():
        FAMILY.tiny(folder, variant, 0)
    euler = tmp_path_factory.mktemp("euler")
    FAMILY.tiny(euler, "t2v", 0)
    FlowMatchEulerDiscreteScheduler(shift=12.0).save_pretrained(euler / "scheduler")
    index = json.loads((euler / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (euler / "model_index.json").write_text(json.dumps(index))
    return made | {"euler": euler}


def over_the_wire(tensors: dict[str, torch.Tensor], attributes: dict[str, str]) -> Bundle:
    reader = BundleReader()
    [bundle] = filter(None, (reader.feed(frame_of(message)) for message in bundle_frames(tensors, attributes)))
    return bundle


# ---- Two experts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["t2v", "euler"])
def test_both_experts_take_their_steps_and_any_checkpoint_resumes_bit_for_bit(folders, name, dtype):
    subject = Subject(BY_VARIANT["t2v"], folders[name], dtype)
    params = subject.params(BY_VARIANT["t2v"].wishes[0])
    stock = subject.stock(params)
    engine, events, used = subject.engine(**ALONE), [], []
    engine.admit(subject.job("a", params))
    checkpoints = []
    for _ in range(params.steps - 1):
        events += engine.tick()
        engine.request_checkpoint("a", stop=False)
    assert equal(run(engine, events)["a"], stock)
    checkpoints = [event for event in events if isinstance(event, Checkpointed)]
    assert [checkpoint.step for checkpoint in checkpoints] == list(range(1, params.steps))
    for checkpoint in checkpoints:
        state = FAMILY.dit.prepare(subject.dit, "a", params, subject.job("a", params).conditions)
        state.step = checkpoint.step
        used.append(FAMILY.dit.expert(subject.dit, state))
        other = subject.engine(**ALONE)
        other.admit(subject.job("a", params, over_the_wire(checkpoint.tensors, checkpoint.attributes)))
        assert equal(run(other, [])["a"], stock), checkpoint.step
    assert set(used) == {"high_noise", "low_noise"}


def test_the_boundary_itself_belongs_to_the_high_noise_expert(folders):
    subject = Subject(BY_VARIANT["t2v"], folders["t2v"])
    params = subject.params(BY_VARIANT["t2v"].wishes[0])
    state = FAMILY.dit.prepare(subject.dit, "a", params, subject.job("a", params).conditions)
    state.timesteps = torch.tensor([876, 875, 874])
    taken = []
    for state.step in range(3):
        taken.append(FAMILY.dit.expert(subject.dit, state))
    assert taken == ["high_noise", "high_noise", "low_noise"]


def test_requests_of_different_experts_never_share_a_forward(folders):
    subject = Subject(BY_VARIANT["t2v"], folders["t2v"])
    params = subject.params(BY_VARIANT["t2v"].wishes[0])
    engine, events = subject.engine(max_batch=8), []
    engine.admit(subject.job("first", params))
    for _ in range(4):
        events += engine.tick()
    engine.admit(subject.job("second", params))
    results = run(engine, events)
    shared = [event.step for event in events if isinstance(event, Stepped) and event.batch == 2]
    assert not shared, "the first had only low-noise steps left while the second made high-noise ones"
    assert equal(results["first"], results["second"])


def test_each_experts_guidance_matters_and_the_models_own_pair_is_the_default(folders):
    subject = Subject(BY_VARIANT["t2v"], folders["t2v"])
    wish = BY_VARIANT["t2v"].wishes[0]
    pairs = {
        "own": wish,
        "explicit": replace(wish, guidance=4.0, guidance_2=3.0),
        "one": replace(wish, guidance=4.0),
        "both": replace(wish, guidance=4.0, guidance_2=4.0),
    }
    made = {}
    for name, pair in pairs.items():
        engine = subject.engine(**ALONE)
        engine.admit(subject.job(name, subject.params(pair)))
        made[name] = run(engine, [])[name]
    assert equal(made["own"], made["explicit"])
    assert equal(made["one"], made["both"])
    assert not equal(made["own"], made["both"])


def test_a_multistep_schedulers_state_travels_whole(folders):
    subject = Subject(BY_VARIANT["t2v"], folders["t2v"])
    params = subject.params(BY_VARIANT["t2v"].wishes[0])
    conditions = subject.job("a", params).conditions
    state = FAMILY.dit.prepare(subject.dit, "a", params, conditions)
    for _ in range(3):
        FAMILY.dit.advance(subject.dit, state, torch.randn_like(state.latents))
    fresh = FAMILY.dit.prepare(subject.dit, "a", params, conditions)
    tensors, attributes = save_state(state)
    bundle = over_the_wire(tensors, attributes)
    restore_state(subject.dit, fresh, bundle.tensors, bundle.attributes)
    before, after = vars(state.scheduler), vars(fresh.scheduler)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key == "_internal_dict":
            continue
        pairs = zip(value, after[key], strict=True) if isinstance(value, list) else [(value, after[key])]
        for ours, theirs in pairs:
            if isinstance(ours, torch.Tensor):
                assert ours.dtype == theirs.dtype, key
                assert torch.equal(ours, theirs), key
            else:
                assert ours == theirs, key
    assert state.timesteps.dtype == torch.int64


# ---- VAE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [13, 1])
@pytest.mark.parametrize("variant", ["t2v", "ti2v"])
def test_decoded_frames_are_the_stock_pipelines(folders, variant, frames):
    pipeline = WanPipeline.from_pretrained(folders[variant], dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = {"prompt": "a", "width": 64, "height": 96, "num_frames": frames, "num_inference_steps": 2}
    latents = pipeline(**options, generator=torch.Generator().manual_seed(1), output_type="latent").frames
    theirs = pipeline(**options, generator=torch.Generator().manual_seed(1), output_type="pt").frames
    vae = FAMILY.vae.load(open_source(str(folders[variant])), CPU, torch.float32)
    wish = GenerationParams(model="m", prompt="a", width=64, height=96, num_frames=frames)
    params = resolve(wish, FAMILY.variants[variant].limits, seed=0)
    decoded = torch.cat(list(FAMILY.vae.decode(vae, [{"latents": latents}], params)), dim=1)
    assert decoded.shape == (1, frames, 3, 96, 64)
    ours = (decoded * 0.5 + 0.5).clamp(0, 1)
    # Convolutions in time are 2-D ones: the same sums in another order, and for a single frame without the zeros.
    assert 0 < (ours - theirs).abs().max() <= 1e-5
    again = torch.cat(list(FAMILY.vae.decode(vae, [{"latents": -latents}, {"latents": latents}], params)), dim=1)
    assert (again[1] - decoded[0]).abs().max() <= 1e-5
    with pytest.raises(InvalidRequest, match="of shape"):
        FAMILY.vae.decode(vae, [{"latents": latents}], replace(params, num_frames=frames + 4))


def given(folder, variant: str, inputs, num_frames: int = 9):
    """What the VAE part makes of inputs for a clip of 64x96, and the pipeline's latents and what it adds to them."""
    wish = GenerationParams(model="m", prompt="a", width=64, height=96, num_frames=num_frames, inputs=tuple(inputs))
    params = resolve(wish, FAMILY.variants[variant].limits, seed=0)
    ours = FAMILY.vae.encode(
        FAMILY.vae.load(open_source(str(folder)), CPU, torch.float32), decode_inputs(inputs), params
    )
    pipeline = picture_pipeline(folder, torch.float32)
    pictures = {
        role: pipeline.video_processor.preprocess(image, height=96, width=64)
        for role, image in pictures_of(params).items()
    }
    sizes = {"height": 96, "width": 64, "num_frames": num_frames, "num_channels_latents": pipeline.vae.config.z_dim}
    return ours, pipeline.prepare_latents(batch_size=1, dtype=torch.float32, device=CPU, **sizes, **pictures)


def test_the_first_frame_is_the_stock_pipelines(folders):
    ours, (_, theirs, _) = given(folders["ti2v"], "ti2v", [picture(200, 90, 1)])
    assert ours["first_frame"].shape == theirs.shape == (1, 48, 1, 6, 4)
    assert torch.allclose(ours["first_frame"], theirs, atol=1e-5)


@pytest.mark.parametrize("roles", [("image",), ("image", "last_image")])
def test_what_is_given_of_a_clip_is_the_stock_pipelines(folders, roles):
    inputs = [picture(64 + 9 * index, 90, index, role) for index, role in enumerate(roles)]
    ours, (_, theirs) = given(folders["i2v"], "i2v", inputs)
    assert ours["condition"].shape == theirs.shape == (1, 20, 3, 12, 8)
    assert torch.equal(ours["condition"][:, :4], theirs[:, :4])
    assert torch.allclose(ours["condition"], theirs, atol=1e-5)
    assert int(ours["condition"][:, :4].sum()) == 96 * (4 + len(roles) - 1)


def test_clips_that_cannot_begin_or_end_so_are_refused(folders):
    def encode(inputs, num_frames: int = 9) -> None:
        limits = replace(FAMILY.variants["i2v"].limits, min_inputs=0)
        wish = GenerationParams(model="m", prompt="a", width=64, height=96, num_frames=num_frames, inputs=tuple(inputs))
        vae = FAMILY.vae.load(open_source(str(folders["i2v"])), CPU, torch.float32)
        FAMILY.vae.encode(vae, decode_inputs(inputs), resolve(wish, limits, seed=0))

    with pytest.raises(InvalidRequest, match="role image"):
        encode([picture(64, 96, 1, "last_image")])
    with pytest.raises(InvalidRequest, match="num_frames is 1"):
        encode([picture(64, 96, 1), picture(64, 96, 2, "last_image")], num_frames=1)


@pytest.mark.parametrize(
    ("variant", "roles", "says"),
    [
        ("t2v", ["image"], "takes no input pictures"),
        ("ti2v", ["image", "image"], "it must be between 0 and 1"),
        ("ti2v", ["last_image"], "takes image"),
        ("i2v", [], "needs an input picture"),
        ("i2v", ["last_image"], "of the role image"),
        ("i2v", ["image", "last_image", "last_image"], "of the role last_image .* between 0 and 1"),
        ("i2v", ["image", "mask"], "takes image, last_image"),
        ("i2v_one_expert", ["image", "last_image"], "takes image"),
        ("flf2v", ["image"], "of the role last_image .* must be 1"),
    ],
)
def test_inputs_that_a_variant_does_not_take_are_refused(variant, roles, says):
    inputs = tuple(picture(8, 8, 1, role) for role in roles)
    with pytest.raises(InvalidRequest, match=says):
        resolve(GenerationParams(model="m", prompt="a", inputs=inputs), FAMILY.variants[variant].limits, seed=0)


@pytest.mark.parametrize("variant", ["i2v", "flf2v"])
@pytest.mark.parametrize("change", ["missing", "shape", "dtype"])
def test_wrong_latents_and_pictures_are_refused(folders, variant, change):
    subject = Subject(BY_VARIANT[variant], folders[variant])
    params = subject.params(BY_VARIANT[variant].wishes[0])
    conditions = subject.job("a", params).conditions
    for name in ("condition", "positive/pictures") if variant == "flf2v" else ("condition",):
        wrong = dict(conditions)
        tensor = wrong.pop(name)
        if change != "missing":
            wrong[name] = tensor[:, :-1] if change == "shape" else tensor.to(torch.int64)
        with pytest.raises(InvalidRequest, match=name):
            subject.engine().admit(DenoiseJob("x", params, wrong))


def test_clips_with_and_without_a_first_picture_share_a_batch(folders):
    subject = Subject(BY_VARIANT["ti2v"], folders["ti2v"])
    bare = BY_VARIANT["ti2v"].wishes[0]
    wishes = {"bare": bare, "begun": replace(bare, inputs=(picture(64, 96, 1),), seed=5)}
    alone = {}
    for name, wish in wishes.items():
        engine = subject.engine(**ALONE)
        engine.admit(subject.job(name, subject.params(wish)))
        alone |= run(engine, [])
    engine, events = subject.engine(branches="rows", max_batch=8), []
    for name, wish in wishes.items():
        engine.admit(subject.job(name, subject.params(wish)))
    results = run(engine, events)
    assert {event.batch for event in events if isinstance(event, Stepped)} == {2}
    for name, tensors in alone.items():
        assert difference(results[name], tensors) <= 1e-4


# ---- Text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["a  red &amp;amp; blue\n circle ", "", "a cat jumps " * 300])
def test_embeddings_are_the_stock_pipelines_without_the_zeros(folders, prompt):
    pipeline = WanPipeline.from_pretrained(folders["t2v"], dtype=torch.float32)
    theirs, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
    model = FAMILY.text.load(open_source(str(folders["t2v"])), CPU, torch.float32)
    [tensors] = FAMILY.text.encode(model, [TextInput(prompt)])
    tokens = len(tensors["text"])
    assert tokens == min(512, int(theirs[0].abs().sum(-1).gt(0).sum()))
    assert torch.equal(tensors["text"], theirs[0, :tokens])
    assert not theirs[0, tokens:].any()
    together = FAMILY.text.encode(model, [TextInput("a dog"), TextInput(prompt)])
    assert torch.allclose(together[1]["text"], tensors["text"], atol=1e-5)


def test_prompts_are_cleaned():
    assert clean(" a  &lt;b&gt; &amp;amp; c\n") == "a <b> & c"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("positive/text", torch.zeros(1, 513, 48)),
        ("positive/text", torch.zeros(1, 5, 7)),
        ("positive/text", torch.zeros(1, 5, 48, dtype=torch.int64)),
        ("positive/other", torch.zeros(1, 5, 48)),
    ],
)
def test_wrong_conditions_are_refused(folders, name, tensor):
    subject = Subject(BY_VARIANT["t2v"], folders["t2v"])
    params = subject.params(replace(BY_VARIANT["t2v"].wishes[0], guidance=1.0))
    with pytest.raises(InvalidRequest, match="condition"):
        subject.engine().admit(DenoiseJob("x", params, {name: tensor}))


# ---- Folders, presets, the whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({"prediction_type": "epsilon"}, "flow_prediction"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ],
)
def test_a_scheduler_that_cannot_be_served_stops_the_start(folders, tmp_path, changes, says):
    FAMILY.tiny(tmp_path, "t2v", 0)
    file = tmp_path / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(StartupError, match=says):
        FAMILY.dit.load(open_source(str(tmp_path)), CPU, torch.float32)


def test_a_weight_that_is_missing_stops_the_start(tmp_path):
    FAMILY.tiny(tmp_path, "t2v_one_expert", 0)
    file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["blocks.2.ffn.net.2.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(StartupError, match=r"blocks\.2\.ffn\.net\.2\.weight"):
        FAMILY.dit.load(open_source(str(tmp_path)), CPU, torch.float32)


def test_random_weights_keep_in_fp32_what_loaded_weights_keep(folders):
    folder = folders["t2v_one_expert"]
    loaded = open_source(str(folder)).load(WanTransformer3DModel, "transformer", CPU, torch.bfloat16)
    config = json.loads((folder / "transformer/config.json").read_text())
    source = ModelSource("random:1", "wan", "t2v_one_expert", seed=1, preset={"transformer": config})
    made = source.load(WanTransformer3DModel, "transformer", CPU, torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in loaded.named_parameters()}
    assert {name: tensor.dtype for name, tensor in made.named_parameters()} == dtypes
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, made.get_buffer(name)), name


@pytest.mark.parametrize(
    ("preset", "variant", "billions"),
    [
        ("wan2.2-t2v-a14b", "t2v", {"transformer": 14.29, "transformer_2": 14.29, "text_encoder": 5.68, "vae": 0.127}),
        ("wan2.1-t2v-14b", "t2v_one_expert", {"transformer": 14.29, "text_encoder": 5.68, "vae": 0.127}),
        ("wan2.2-ti2v-5b", "ti2v", {"transformer": 5.0, "text_encoder": 5.68, "vae": 0.705}),
        ("wan2.1-t2v-1.3b", "t2v_one_expert", {"transformer": 1.42}),
        ("wan2.2-i2v-a14b", "i2v", {"transformer": 14.29, "transformer_2": 14.29}),
        ("wan2.1-i2v-14b-480p", "i2v_one_expert", {"transformer": 16.4, "image_encoder": 0.632}),
        ("wan2.1-i2v-14b-720p", "i2v_one_expert", {"transformer": 16.4}),
        ("wan2.1-flf2v-14b", "flf2v", {"transformer": 16.4}),
        ("wan2.1-vace-1.3b", "vace", {"transformer": 2.15}),
        ("wan2.1-vace-14b", "vace", {"transformer": 17.34}),
    ],
)
def test_presets_have_the_published_sizes(preset, variant, billions):
    source = open_source("random:1", family="wan", preset=preset)
    assert source.variant == variant
    for component, expected in billions.items():
        config = source.config(component)
        with torch.device("meta"):
            if component == "text_encoder":
                module = UMT5EncoderModel(UMT5Config.from_dict(config))
            elif component == "image_encoder":
                module = CLIPVisionModel(CLIPVisionConfig.from_dict(config))
            elif component == "vae":
                module = AutoencoderKLWan.from_config(config)
            else:
                cls = WanVACETransformer3DModel if "vace_layers" in config else WanTransformer3DModel
                module = cls.from_config(config)
        count = sum(parameter.numel() for parameter in module.parameters()) / 1e9
        assert abs(count - expected) <= 0.005 * expected, (component, count)


def test_a_clip_without_a_cluster(folders):
    with Local(str(folders["ti2v"]), width=96, height=64, steps=2) as model:
        result = model.generate("a cat jumps", num_frames=9)
    assert (result.mime, result.num_frames, result.fps) == ("video/mp4", 9, 24.0)
    with av.open(io.BytesIO(result.data)) as container:
        assert len(list(container.decode(video=0))) == 9
    # A player that reads from the front finds the index before the pictures.
    assert result.data.index(b"moov") < result.data.index(b"mdat")
