"""The demo's scenes in motion: what their captions, their judge and their training claim."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn

from demo import __main__ as make_demo
from demo.__main__ import frames_of
from demo.clips import components, train_autoencoder, train_text
from demo.clips.batches import batch_of, paint
from demo.clips.captions import combination, held_out_combination, held_out_form, parse, training_pair
from demo.clips.evaluate import CHECKPOINT, held_out, judge, shuffled
from demo.clips.scenes import FPS, NUM_FRAMES, PATHS, SIDE_PX, SIZES_PX, draw_clip, sample_moving_scene, track
from demo.clips.scorer import score
from demo.clips.train import EMPTY_PROMPTS, tokenize
from demo.clips.train_denoiser import (
    LatentClips,
    encode_text,
    modules_of,
    padding_bias,
    patchify,
    predict,
    rotary_factors,
    train,
)
from demo.scenes import SHAPES
from demo.stage import Stage
from services.clip_writer import encode_frames
from services.families.wan.presets import NEGATIVE_PROMPT


@pytest.fixture(scope="module")
def model():
    return components.build(seed=3)


def test_the_judge_agrees_with_true_scenes_and_not_with_shuffled_captions():
    pairs = held_out(60, seed=7)
    clips = [draw_clip(scene) for scene, _ in pairs]
    true, false = judge(pairs, clips), judge(shuffled(pairs), clips)
    assert min(true.colours, true.shapes, true.paths, true.speeds, true.agree, true.smooth) >= 0.99
    assert max(false.objects, false.paths, false.agree) < 0.2


@pytest.mark.parametrize("wrong", ["colour", "shape", "background", "path", "speed"])
def test_the_judge_tells_each_thing_that_is_wrong(wrong):
    rng = Random(5)
    for _ in range(6):
        scene = sample_moving_scene(rng)
        other = {
            "colour": next(c for c in ("red", "blue", "green") if c not in (scene.colour, scene.background)),
            "background": next(c for c in ("red", "blue", "green") if c not in (scene.colour, scene.background)),
            "shape": SHAPES[(SHAPES.index(scene.shape) + 1) % len(SHAPES)],
            "path": PATHS[(PATHS.index(scene.path) + 1) % len(PATHS)],
            "speed": "slow" if scene.speed == "fast" else "fast",
        }[wrong]
        found = score(draw_clip(scene), replace(scene, **{wrong: other}))
        assert not found.agrees and found.smooth is (wrong != "colour")
        if wrong == "speed":
            assert found.path_right and score(draw_clip(scene), replace(scene, speed=other), names_speed=False).agrees


def test_a_motion_that_jumps_and_one_that_stops_are_told():
    scene = replace(sample_moving_scene(Random(2)), speed="fast", path=PATHS[0], x=30.0)
    clip = draw_clip(scene)
    jumping = clip[np.arange(33) // 4 * 4]
    assert not score(jumping, scene).smooth and score(jumping, scene).object_right
    still = np.repeat(clip[:1], 33, axis=0)
    assert not score(still, scene).path_right and not score(still, scene).speed_right


def test_a_clip_of_twice_the_frames_is_judged_alike():
    scene = sample_moving_scene(Random(11))
    clip = draw_clip(scene)
    doubled = np.repeat(clip, 2, axis=0)[:-1]
    assert score(doubled, scene).agrees


def test_the_judge_reads_clips_as_they_come_from_the_service():
    pairs = held_out(4, seed=9)
    _, data = zip(*(encode_frames(draw_clip(scene), "mp4", 90, FPS) for scene, _ in pairs), strict=True)
    found = judge(pairs, [frames_of(encoded) for encoded in data])
    assert found.agree == 1.0 and found.smooth == 1.0


def test_objects_stay_inside_and_paint_draws_what_draw_clip_draws():
    rng = Random(4)
    scenes = [sample_moving_scene(rng) for _ in range(200)]
    for scene in scenes:
        reach = SIZES_PX[scene.size]
        assert track(scene).min() >= reach and track(scene).max() <= SIDE_PX - reach
    assert {scene.path for scene in scenes} == set(PATHS)
    batch = batch_of(scenes[:8])
    painted, weight = paint(batch, batch.tracks())
    drawn = np.stack([draw_clip(scene) for scene in scenes[:8]])
    assert np.abs((painted.permute(0, 2, 3, 4, 1).numpy() + 1) * 127.5 - drawn).max() <= 0.51
    weights = train_autoencoder.patch_weights(weight)
    assert weights.shape == (8, 576) and torch.allclose(weights.float().mean(1), torch.ones(8), atol=1e-2)


def test_captions_say_what_the_scene_is_and_what_is_judged_was_not_trained():
    rng = Random(3)
    trained, judged = [training_pair(rng, 2) for _ in range(400)], held_out(200)
    for scene, caption in [(scene, caption) for scene, captions in trained for caption in captions] + judged:
        asked = parse(caption.text)
        assert asked is not None, caption.text
        same = ("shape", "colour", "background", "path")
        assert all(getattr(asked.scene, name) == getattr(scene, name) for name in same), caption.text
        assert asked.names_speed is caption.names_speed
        assert not caption.names_speed or asked.scene.speed == scene.speed
    assert not any(held_out_combination(combination(scene)) for scene, _ in trained)
    assert all(held_out_combination(combination(scene)) for scene, _ in judged)
    forms = {caption.form for _, captions in trained for caption in captions}
    assert not any(map(held_out_form, forms)) and all(held_out_form(caption.form) for _, caption in judged)
    assert parse("a cat on a red background") is None
    assert parse("a red circle on a blue background") is None


def test_every_word_of_a_caption_is_known_and_other_prompts_are_trained_as_none(model):
    texts = [caption.text for _, caption in held_out(300, seed=5)]
    tokens, lengths = tokenize(model.tokenizer, texts)
    assert not (tokens == model.tokenizer.unk_token_id).any() and lengths.max() < tokens.shape[1]
    assert model.tokenizer(NEGATIVE_PROMPT)["input_ids"] == model.tokenizer(EMPTY_PROMPTS[-1])["input_ids"]
    with pytest.raises(ValueError, match="at most 47"):
        tokenize(model.tokenizer, ["red " * 60])


def test_whole_clips_are_coded_as_the_stock_class_codes_chunks(model):
    clips = torch.rand(1, 3, 17, 32, 32) * 2 - 1
    with torch.no_grad():
        stock = model.vae.encode(clips).latent_dist.parameters
        decoded = model.vae.decode(stock[:, :16]).sample
        with train_autoencoder.whole_clips(model.vae):
            ours = train_autoencoder.encode(model.vae, clips)
            ours_decoded = train_autoencoder.decode(model.vae, stock[:, :16]).clamp(-1, 1)
        assert "forward" not in vars(model.vae.encoder.conv_in)
    assert torch.allclose(ours, stock, atol=1e-5) and torch.allclose(ours_decoded, decoded, atol=1e-5)


def test_training_starts_with_an_autoencoder_that_codes_each_frame_as_the_picture_model_does():
    vae = components.build_autoencoder()
    components.copy_picture_autoencoder(vae)
    pictures = AutoencoderKLQwenImage.from_pretrained(components.PICTURE_MODEL / "vae", torch_dtype=torch.float32)
    scene = batch_of([replace(sample_moving_scene(Random(6)), speed="fast")])
    clips = paint(scene, scene.tracks()[:, :9])[0][..., 32:96, 32:96]
    with torch.no_grad():
        latents = vae.encode(clips).latent_dist.mean
        newest = torch.cat([pictures.encode(clips[:, :, i : i + 1]).latent_dist.mean for i in (0, 4, 8)], dim=2)
        assert torch.allclose(latents, newest, atol=1e-4)
        shown = torch.cat([pictures.decode(newest[:, :, i : i + 1]).sample for i in (0, 1, 1, 1, 1, 2, 2, 2, 2)], dim=2)
        assert torch.allclose(vae.decode(newest).sample, shown.clamp(-1, 1), atol=1e-4)
        inner = (shown - clips)[:, :, ::4, 16:-16, 16:-16]
        assert (inner**2).mean() < 0.004, "30 dB in every fourth frame"


def test_latents_are_evened_out_and_clips_coded_as_before():
    vae, rng = components.build_autoencoder(), Random(6)
    components.copy_picture_autoencoder(vae)
    scenes = batch_of([sample_moving_scene(rng) for _ in range(3)])
    clip = paint(scenes[:1], scenes[:1].tracks()[:, :5])[0]

    def coded() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad(), train_autoencoder.whole_clips(vae):
            mean, _ = train_autoencoder.encode(vae, clip).chunk(2, dim=1)
            return mean, train_autoencoder.decode(vae, mean)

    def spread(latents: torch.Tensor) -> float:
        powers = torch.linalg.eigvalsh(torch.cov(latents.transpose(0, 1).flatten(1)))
        return float(powers[-1] / powers[8])

    before, decoded = coded()
    train_autoencoder.even_out(vae, scenes, batch_size=2)
    after, decoded_after = coded()
    assert torch.allclose(decoded, decoded_after, atol=1e-3)
    assert spread(after) < spread(before) ** 0.5


def test_text_and_velocity_are_those_of_the_stock_classes(model):
    torch.manual_seed(0)
    for block in model.transformer.blocks:  # What starts at zero would hide errors.
        nn.init.normal_(block.scale_shift_table, std=0.3)
        nn.init.normal_(block.attn2.to_out[0].weight, std=0.1)
    for layer in (model.transformer.proj_out, model.transformer.condition_embedder.time_proj):
        nn.init.normal_(layer.weight, std=0.05)
    tokens, lengths = tokenize(model.tokenizer, ["a red circle moves up on a blue background", ""])
    padded = nn.functional.pad(tokens.long(), (0, 512 - tokens.shape[1]))
    mask = (torch.arange(512) < lengths[:, None]).long()
    latents, timestep = torch.randn(2, 16, 9, 16, 16), torch.tensor([900.0, 31.0])
    with torch.no_grad():
        hidden = model.text_encoder(padded, mask).last_hidden_state * mask[..., None]
        text = encode_text(model.text_encoder, tokens.long(), lengths.long())
        assert torch.allclose(text, hidden[:, : tokens.shape[1]], atol=1e-4)
        stock = model.transformer(latents, timestep, hidden, return_dict=False)[0]
        bias = padding_bias(lengths.long(), tokens.shape[1])
        ours = predict(model.transformer, latents, timestep, text, bias, rotary_factors(model.transformer, latents))
    assert torch.allclose(ours, patchify(stock), atol=1e-4 * float(stock.abs().max()))


def test_the_denoiser_learns_and_goes_on_from_its_state(model, tmp_path):
    torch.manual_seed(1)
    tokens, lengths = tokenize(model.tokenizer, ["a red circle moves up on a blue background"] * 4)
    empty, empty_lengths = tokenize(model.tokenizer, EMPTY_PROMPTS)
    data = LatentClips(
        torch.randn(4, 16, 2, 4, 4), torch.ones(4, 8), tokens[:, None], lengths[:, None], empty, empty_lengths
    )
    modules = modules_of(model.text_encoder, model.transformer)
    before = {name: param.detach().clone() for name, param in modules.named_parameters()}
    stage = Stage(modules, peak_lr=1e-3, ema_decay=0.99, planned_s=60.0)
    train(stage, data, batch_size=2, run_s=1.0, compiled=False)
    changed = {name for name, param in modules.named_parameters() if not torch.equal(before[name], param)}
    assert stage.step >= 1 and "transformer.proj_out.weight" in changed
    assert not any(name.startswith("text_encoder.") for name in changed)
    stage.save(tmp_path / "state.safetensors")
    again = Stage(modules, peak_lr=1e-3, ema_decay=0.99, planned_s=60.0)
    again.resume(tmp_path / "state.safetensors")
    assert (again.step, again.seconds) == (stage.step, stage.seconds)


def test_a_text_encoder_that_was_just_built_tells_the_order_of_headings():
    built = components.build(seed=5)
    prompts = [
        f"a red circle moves {first} and then turns {second} on a blue background"
        for first, second in (("right", "down"), ("down", "right"))
    ]
    tokens, lengths = tokenize(built.tokenizer, prompts)
    with torch.no_grad():
        text = encode_text(built.text_encoder, tokens.long(), lengths.long()).sum(1)
    assert (text[0] - text[1]).norm() >= 0.1 * text[0].norm()


def test_the_text_encoder_learns_to_tell_captions_and_goes_on_from_its_state(tmp_path):
    torch.manual_seed(2)
    built, rng = components.build(seed=5), Random(8)
    pairs = [training_pair(rng, 2) for _ in range(64)]
    tokens, lengths = tokenize(built.tokenizer, [caption.text for _, captions in pairs for caption in captions])
    labels = train_text.labels_of(batch_of([scene for scene, _ in pairs]))
    reader = train_text.Reader(components.TEXT_WIDTH, [8, 10, 10, 16, 2, 2])
    modules = nn.ModuleDict({"text_encoder": built.text_encoder, "reader": reader})
    stage = Stage(modules, peak_lr=2e-3, ema_decay=0.9, planned_s=60.0)
    inputs = tokens.view(64, 2, -1), lengths.view(64, 2), labels
    first = train_text.train(stage, *inputs, batch_size=32, run_s=1e-9)
    assert stage.step == 1
    while stage.step < 60 and not stage.finished:
        last = train_text.train(stage, *inputs, batch_size=32, run_s=0.5)
    assert last.mean() > first.mean() + 0.2
    stage.save(tmp_path / "state.safetensors")
    again = Stage(modules, peak_lr=2e-3, ema_decay=0.9, planned_s=60.0)
    again.resume(tmp_path / "state.safetensors")
    assert (again.step, again.seconds) == (stage.step, stage.seconds)


def test_training_starts_from_a_saved_folder(tmp_path):
    built, other = components.build(seed=5), components.build(seed=6)
    components.save(built, tmp_path)
    components.copy_weights(other, tmp_path)
    for name in ("text_encoder", "transformer", "vae"):
        for mine, theirs in zip(getattr(built, name).parameters(), getattr(other, name).parameters(), strict=True):
            assert torch.equal(mine, theirs.half()), name


def test_training_tells_which_part_of_a_folder_it_cannot_start_from(tmp_path):
    built, other = components.build(seed=5), components.build(seed=6)
    other.vae = AutoencoderKLWan.from_config({**other.vae.config, "dim_mult": [1, 2, 2, 2]})
    components.save(other, tmp_path)
    before = built.text_encoder.shared.weight.clone()
    with pytest.raises(RuntimeError, match=f"the vae of {tmp_path} has other sizes"):
        components.copy_weights(built, tmp_path)
    assert torch.equal(built.text_encoder.shared.weight, before)


def test_a_saved_folder_is_the_family_s_and_small(tmp_path):
    built = components.build(seed=0)
    components.save(built, tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["text_encoder", "transformer", "vae"]
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 12_000_000
    loaded = components.load(tmp_path)
    assert type(loaded).__name__ == "WanPipeline" and loaded.config.boundary_ratio is None
    for name in ("text_encoder", "transformer", "vae"):
        kept = getattr(built, name).state_dict()
        for key, value in getattr(loaded, name).state_dict().items():
            assert torch.equal(value.half(), kept[key].half()), (name, key)


def test_make_demo_serves_what_there_are_weights_for(tmp_path, monkeypatch):
    monkeypatch.setattr(make_demo, "CLIPS_WEIGHTS", tmp_path / "wan")
    monkeypatch.setattr(make_demo, "INTERPOLATOR_WEIGHTS", tmp_path / "net.safetensors")
    assert set(make_demo.cluster_config().models) == {"demo"}
    (tmp_path / "wan").mkdir()
    config = make_demo.cluster_config()
    assert set(config.models) == {"demo", "demo-clips"} and config.interpolation is None
    assert config.models["demo-clips"].limits["default_frames"] == NUM_FRAMES
    (tmp_path / "net.safetensors").touch()
    config = make_demo.cluster_config()
    assert config.interpolation is not None and config.gateway.http_port == 0


def test_the_weights_that_ship_are_small_and_have_a_card():
    if not CHECKPOINT.exists():
        return
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) <= 12_000_000
    card = (CHECKPOINT / "README.md").read_text()
    assert all(word in card for word in ("data", "demo.clips.train", "seed", "licence", "demo.clips.evaluate"))
