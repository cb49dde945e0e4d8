"""A VAE over ranks: exactly what one rank makes of whole pictures, or of the same tiles, and what each rank holds."""

from __future__ import annotations

import pytest
import torch

from dit_svc.dry_run import LiveBytes
from services.config import ParallelSection
from services.errors import StartupError
from services.families import FAMILIES, load_family
from services.parallel.degrees import Degrees, check_patches
from services.parallel.mesh import PlannedMesh
from services.parallel.vae_patch import PatchCodec
from services.parallel.vae_tiles import TileCodec, check_tile
from services.weights import open_source
from tests.parallel.jobs import VaeReport, config_of, shared
from tests.parallel.vaes import KINDS, latents_of, library_vae, pixels_of, vae_model
from vae_svc.loading import open_engine

META = torch.device("meta")
# Height and width in latents: rows that 2 and 4 do not divide, columns longer than rows, fewer latents than 4 ranks.
SIZES = [(11, 6), (5, 9), (3, 2)]


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def everything(report: VaeReport) -> list[torch.Tensor]:
    return [chunk for chunks in report.decoded for chunk in chunks] + report.encoded


def work_of(kind: str):
    """Latents to decode and pixels to encode: pictures, and clips where the VAE makes them."""
    clips = KINDS[kind].clips
    latents = [latents_of(kind, *size, batch=2) for size in SIZES]
    latents += [latents_of(kind, 7, 4, frames=3)] if clips else []
    pixels = [pixels_of(kind, *size) for size in SIZES]
    pixels += [pixels_of(kind, 5, 3, frames=9)] if clips else []
    return latents, pixels


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "as on GPUs"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_make_exactly_what_one_makes_of_whole_pictures(pool, kind, world, fused):
    latents, pixels = work_of(kind)
    alone = shared(kind, None, 0, latents, pixels)
    reports = pool.run("share_vae", world, kind, 0, latents, pixels, fused)
    for report in reports:
        for ours, theirs in zip(report.decoded, alone.decoded, strict=True):
            assert len(ours) == len(theirs)
            for chunk, expected in zip(ours, theirs, strict=True):
                assert apart(chunk, expected) <= 1e-5
        for ours, theirs in zip(report.encoded, alone.encoded, strict=True):
            assert apart(ours, theirs) <= 1e-5
        for ours, theirs in zip(everything(report), everything(reports[0]), strict=True):
            assert torch.equal(ours, theirs), "on all ranks, bit for bit"
        assert report.sent["halo"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_makes_what_the_library_makes(kind):
    latents, pixels = work_of(kind)
    alone, library = shared(kind, None, 0, latents, pixels), library_vae(kind)
    for ours, given in zip(alone.decoded, latents, strict=True):
        whole = torch.cat(ours, dim=2) if KINDS[kind].clips else ours[0]
        theirs = library.decode(given).sample
        assert apart(whole.clamp(-1, 1), theirs.clamp(-1, 1)) <= 1e-5
    for ours, given in zip(alone.encoded, pixels, strict=True):
        assert apart(ours, library.encode(given).latent_dist.parameters) <= 1e-5


# ---- Tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_over_ranks_are_those_of_one_rank_bit_for_bit(pool, kind, world):
    side_px = 4 * KINDS[kind].compression
    latents, pixels = work_of(kind)
    # In a process as the others are: another number of threads costs the last bits.
    [alone] = pool.run("share_vae", 1, kind, side_px, latents, pixels)
    for report in pool.run("share_vae", world, kind, side_px, latents, pixels):
        for ours, theirs in zip(everything(report), everything(alone), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["kl", "flux2", "qwen", "wan"])
def test_tiles_are_the_librarys(kind):
    """Where it has patches too (wan_residual), the library blends in another place."""
    library, side_px = library_vae(kind), 32
    codec = TileCodec(vae_model(kind).codec, side_px, 8)
    frames = 3 if KINDS[kind].clips else 1
    latents, pixels = latents_of(kind, 9, 6, frames), pixels_of(kind, 9, 6, 4 * frames - 3)
    whole = torch.cat(list(codec.decode(latents)), dim=2) if frames > 1 else next(codec.decode(latents))
    if frames > 1:
        library.enable_tiling(side_px, side_px, side_px * 3 // 4, side_px * 3 // 4)
    else:
        library.enable_tiling()
        library.tile_sample_min_size, library.tile_latent_min_size = side_px, side_px // 8
    assert torch.allclose(whole.clamp(-1, 1), library.decode(latents).sample.clamp(-1, 1), atol=1e-6)
    assert apart(codec.encode(pixels), library.encode(pixels).latent_dist.parameters) <= 1e-6


@pytest.mark.parametrize("side_px", [8, 40, 100])
def test_tiles_of_no_whole_latents_are_refused(side_px):
    lower = max(32, side_px // 32 * 32)
    with pytest.raises(StartupError, match=f"tile_px {side_px} is no multiple of 32 .*use {lower} or {lower + 32}"):
        check_tile(side_px, 8)


@pytest.mark.parametrize(
    ("ranks", "mode", "tile_px", "says"),
    [
        (2, "tiles", 0, "engine.tile_px is 0: give it a tile's side"),
        (2, "exact", 256, "set it to 0, or use tiles"),
        (257, "exact", 0, "vae_patch_parallel_size 257 is more than the 256 latents.*use 1 to 256"),
    ],
)
def test_ranks_that_cannot_share_pictures_are_refused(ranks, mode, tile_px, says):
    with pytest.raises(StartupError, match=says):
        check_patches(ranks, mode, tile_px, 256)


@pytest.mark.parametrize(
    ("parallel", "engine", "says"),
    [
        ({"vae_patch_parallel_size": 2, "vae_patch_mode": "tiles"}, {}, "engine.tile_px is 0"),
        ({"vae_patch_parallel_size": 2, "vae_patch_mode": "tiles"}, {"tile_px": 100}, "use 96 or 128"),
        ({"vae_patch_parallel_size": 1000}, {}, "vae_patch_parallel_size 1000 is more than the .* latents"),
        ({"vae_patch_parallel_size": 2, "vae_patch_mode": "rows"}, {}, "'rows' is unknown: use exact or tiles"),
        ({"vae_patch_parallel_size": 0}, {}, "vae_patch_parallel_size is 0: it must be between 1 and 1024"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_a_weight_is_read(tmp_path, parallel, engine, says):
    load_family("wan").tiny(tmp_path, "t2v", 0)
    for weights in (tmp_path / "vae").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(StartupError, match=says):
        open_engine(config_of(str(tmp_path), ParallelSection(**parallel), engine))


# ---- Memory, at full size, by tensors without bytes ----------------------------------------------------------------


def peak_bytes(
    family: str,
    preset: str,
    sides: tuple[int, int],
    frames: int,
    ranks: int,
    *,
    encode: bool = False,
    tile_px: int = 0,
) -> int:
    """Of one decode or encode, on the rank with the most: the one whose piece is the largest and has two neighbours."""
    part = load_family(family).vae
    model = part.load(open_source("random:0", family=family, preset=preset).without_weights(), META, torch.bfloat16)
    channels, compression, per_latent = part.latent_geometry(model)
    codec = model.codec
    if ranks > 1:
        rank = min(1, ranks - 2)
        codec = PatchCodec(model, part.plan, compression, PlannedMesh(Degrees(patch=ranks), rank)["patch"])
    if tile_px:
        codec = TileCodec(codec, tile_px, compression)
    causal = hasattr(model.module, "clear_cache")
    inner = ((frames if encode else (frames - 1) // per_latent + 1),) if causal else ()
    scale = 1 if encode else compression
    shape = (1, 3 if encode else channels, *inner, sides[0] // scale, sides[1] // scale)
    given = torch.empty(shape, device=META, dtype=torch.bfloat16)
    with torch.no_grad(), LiveBytes([model.module]) as alive:
        if encode:
            codec.encode(given)
        else:
            for _ in codec.decode(given):
                """A chunk is taken and gone."""
    return alive.peak


FULL = [
    ("wan", "wan2.2-t2v-a14b", (480, 832), 9),
    ("wan", "wan2.2-ti2v-5b", (704, 1280), 9),
    ("qwen_image", "qwen-image", (1024, 1024), 1),
    ("flux", "flux1-dev", (1024, 1024), 1),
]


@pytest.mark.parametrize("encode", [False, True], ids=["decode", "encode"])
@pytest.mark.parametrize(("family", "preset", "sides", "frames"), FULL, ids=[full[1] for full in FULL])
def test_a_rank_holds_its_share_of_the_activations(family, preset, sides, frames, encode):
    whole = peak_bytes(family, preset, sides, frames, 1, encode=encode)
    for ranks in (2, 4):
        share = peak_bytes(family, preset, sides, frames, ranks, encode=encode) / whole
        # Beside it: rows of the neighbours, and the whole result.
        assert 1 / ranks < share < 1.25 / ranks + 0.05, (ranks, share)


def test_tiles_bound_the_memory_of_pictures_and_save_little_of_a_clips():
    full = ("qwen_image", "qwen-image", (1024, 1024), 1, 1)
    assert peak_bytes(*full, tile_px=256) < peak_bytes(*full) / 8
    clip = ("wan", "wan2.2-t2v-a14b", (480, 832), 9, 1)
    assert 0.75 < peak_bytes(*clip, tile_px=256) / peak_bytes(*clip) < 0.85


@pytest.mark.parametrize(("ranks"), [1, 2])
def test_memory_does_not_grow_with_the_clip(ranks):
    short, long = (peak_bytes("wan", "wan2.2-t2v-a14b", (480, 832), frames, ranks) for frames in (13, 81))
    assert long < short * 1.005, "but for the latents themselves"


def test_every_family_says_which_of_its_layers_look_at_whole_pictures(tmp_path):
    for name in FAMILIES:
        family = load_family(name)
        family.tiny(tmp_path / name, next(iter(family.variants)), 0)
        vae = family.vae.load(open_source(str(tmp_path / name)), torch.device("cpu"), torch.float32).module
        for half in (vae.encoder, vae.decoder):
            assert any(isinstance(module, family.vae.plan.attention) for module in half.modules()), name
