"""Wan 2.2 A14B with each expert in an engine of its own, both on one GPU: `python -m benchmarks.full_size_experts`.

832x480, 81 frames, guidance by two branches, random weights in bfloat16, compiled blocks, without services. The first
engine ends with a checkpoint at the boundary, which goes through the bytes that services would send, and the second
takes it up. Printed are seconds a step with each expert (to be read beside `benchmarks.full_size_clip`), the hop, and
peak memory with both experts on the device. A rehearsal without a GPU: `--source FOLDER --device cpu --width 64
--height 64 --frames 9`, with the folder of a tiny model.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.full_size_engines import Denoised, config_of, denoise
from benchmarks.full_size_setting import clip_options, note
from benchmarks.load import write_result
from dit_svc.engine import DenoiseJob
from dit_svc.loading import open_engine
from services.config import StageConfig
from services.describe import limits_of, open_model
from services.families import load_family
from services.request import GenerationParams, ResolvedParams, resolve
from services.tensor_wire import frame_of
from services.tensors import Bundle, BundleReader, bundle_frames

EXPERTS = ("high_noise", "low_noise")
TEXT_TOKENS = 512


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """A clip over both engines."""
    configs = {name: config_of(args.source, "wan", "wan2.2-t2v-a14b", args.device, expert=name) for name in EXPERTS}
    engines, features = {}, {}
    for name, config in configs.items():
        engines[name], features[name] = open_engine(config)
        note(f"{name} is ready")
    source = open_model(configs["high_noise"].model)
    params = params_of(args, configs["high_noise"])
    part = load_family(source.family).dit
    conditions = part.example_conditions(engines["high_noise"].model, params, TEXT_TOKENS)
    first = denoise(engines["high_noise"], DenoiseJob("clip", params, conditions))
    note(f"high_noise: {first.figures()}")
    checkpoint, hop_s, nbytes = carried(first)
    second = denoise(engines["low_noise"], DenoiseJob("clip", params, conditions, checkpoint))
    note(f"low_noise: {second.figures()}")
    if second.latents is None or len(first.step_s) + len(second.step_s) != args.steps:
        raise RuntimeError(f"{len(first.step_s)} and {len(second.step_s)} steps were made, not {args.steps}")
    return {
        "work": {name: getattr(args, name) for name in ("width", "height", "frames", "steps")},
        "high_noise": first.figures(),
        "low_noise": second.figures(),
        "checkpoint_bytes": nbytes,
        "hop_s": hop_s,
        "recompiles": sum(feature.metrics().get("dit_recompiles_total", 0) for feature in features.values()),
    }


def params_of(args: argparse.Namespace, config: StageConfig) -> ResolvedParams:
    """The clip."""
    wish = GenerationParams(
        model="m",
        prompt="x",
        width=args.width,
        height=args.height,
        num_frames=args.frames,
        steps=args.steps,
        guidance=4.0,
    )
    return resolve(wish, limits_of(config, open_model(config.model)), seed=0)


def carried(first: Denoised) -> tuple[Bundle, float, int]:
    """The checkpoint as the second engine gets it, the seconds of its way there and back from bytes, and their number.

    Raises:
        RuntimeError: the first engine did not hand the request on.
    """
    if first.handed is None or first.handed.expert != "low_noise":
        raise RuntimeError("the first expert made all steps: ask for more of them")
    started_s = time.perf_counter()
    messages = list(bundle_frames(first.handed.tensors, first.handed.attributes))
    reader, bundle = BundleReader(), None
    for message in messages:
        frame = frame_of(message)
        assert frame is not None
        bundle = reader.feed(frame)
    assert bundle is not None
    return bundle, time.perf_counter() - started_s, sum(map(len, messages))


def main() -> None:
    """Prints the figures."""
    parser = clip_options(__doc__, steps=5)
    args = parser.parse_args()
    write_result(args.json, "full_size_experts", run(args))


if __name__ == "__main__":
    main()
