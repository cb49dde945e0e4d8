"""From a config to a VAE's engine: weights, tiles or ranks, and a first decode that compiles and chooses kernels."""

from __future__ import annotations

from dataclasses import replace

import torch

from services.config import StageConfig
from services.describe import limits_of, open_model, placement
from services.families import load_family
from services.family import VaeModel, VaePart
from services.parallel.degrees import Degrees, check_patches
from services.parallel.mesh import Mesh
from services.parallel.vae_patch import PatchCodec
from services.parallel.vae_tiles import TileCodec, check_tile
from services.request import Limits
from services.vae_attention import attend_by_products
from services.vae_on_gpu import compile_decoder, seal, speed_up
from vae_svc.engine import VaeEngine
from vae_svc.latent_rgb_fit import fit_latent_rgb

# The first has no history, the second has none where the frame rate rises, the third and all others have.
WARM_UP_LATENT_FRAMES = 3


def open_engine(config: StageConfig, mesh: Mesh | None = None) -> VaeEngine:
    """Loads the VAE that a config names.

    Args:
        mesh: of the group, on a rank of several.

    Raises:
        StartupError: its weights cannot be served, or its pictures cannot be shared out as the config says.
    """
    source = open_model(config.model)
    part = load_family(source.family).vae
    check_layout(config)
    model = part.load(source, *placement(config.model))
    on_gpu = model.module.device.type == "cuda"
    if on_gpu:
        attend_by_products(model.module)
    model = share_pictures(config, part, model, mesh)
    if on_gpu:
        speed_up(model.module)
    if config.engine.vae_compile:
        compile_decoder(model.module)
    if config.engine.vae_compile or (config.engine.warmup and model.module.device.type == "cuda"):
        warm_up(part, model, limits_of(config, source))
    if config.engine.vae_compile:
        seal()
    axis = None if mesh is None else mesh["patch"]
    return VaeEngine(part, model, config.engine.max_batch, fit_latent_rgb(part, model), axis=axis)


def warm_up(part: VaePart, model: VaeModel, limits: Limits) -> None:
    """Decodes what requests ask for by default, cut short: kernels are compiled and chosen before the first of them."""
    channels, compression, frames_each = part.latent_geometry(model)
    frames = min((limits.default_frames - 1) // frames_each + 1, WARM_UP_LATENT_FRAMES)
    sides = (limits.default_height // compression, limits.default_width // compression)
    shape = (1, channels, *((frames,) if frames_each > 1 else ()), *sides)
    for _ in model.codec.decode(torch.zeros(shape, device=model.module.device, dtype=model.module.dtype)):
        """The frames are black."""


def check_layout(config: StageConfig) -> None:
    """Whether tiles and ranks fit the VAE that a config names. No weights are needed.

    Raises:
        StartupError: they do not, with numbers that would.
    """
    ranks, mode, tile_px = Degrees.of(config.parallel).patch, config.parallel.vae_patch_mode, config.engine.tile_px
    if ranks == 1 and not tile_px:
        return
    source = open_model(config.model)
    part = load_family(source.family).vae
    _, compression, _ = part.latent_geometry(part.load(source.without_weights(), torch.device("meta"), torch.float32))
    if tile_px:
        check_tile(tile_px, compression)
    if ranks > 1:
        check_patches(ranks, mode, tile_px, limits_of(config, source).max_side_px // compression)


def share_pictures(config: StageConfig, part: VaePart, model: VaeModel, mesh: Mesh | None) -> VaeModel:
    """The model with a codec that works in tiles or over ranks, where the config asks for it."""
    _, compression, _ = part.latent_geometry(model)
    axis = None if mesh is None else mesh["patch"]
    if config.engine.tile_px:
        return replace(model, codec=TileCodec(model.codec, config.engine.tile_px, compression, axis))
    if axis is not None:
        return replace(model, codec=PatchCodec(model, part.plan, compression, axis))
    return model
