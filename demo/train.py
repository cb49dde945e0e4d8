"""Trains the demo model: `python -m demo.train --state DIR --out DIR`.

Draws scenes and captions, trains the autoencoder, encodes the scenes, trains text encoder and transformer, and writes
the folder in the Qwen-Image format. A run ends after `--run-s` seconds; the same command then goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn

from demo import components, train_autoencoder, train_denoiser
from demo.batches import SceneBatch, TrainingSet, patch_weights, sample_training_set, tokenize
from demo.components import Components
from demo.stage import Stage
from demo.tokenizer import IMAGE_PREFIX

EMPTY_PROMPTS = ("", " ")


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True, help="folder for what a later run goes on with")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--scenes", type=int, default=160_000)
    parser.add_argument("--captions", type=int, default=4, help="captions for each scene")
    parser.add_argument("--processes", type=int, default=16, help="processes that draw scenes")
    parser.add_argument("--run-s", type=float, default=540.0, help="seconds after which this run ends")
    parser.add_argument("--autoencoder-s", type=float, default=170.0, help="seconds of training in all")
    parser.add_argument("--denoiser-s", type=float, default=640.0, help="seconds of training in all")
    parser.add_argument("--autoencoder-batch", type=int, default=64)
    parser.add_argument("--denoiser-batch", type=int, default=512)
    parser.add_argument("--denoiser-lr", type=float, default=1.2e-3, help="peak learning rate")
    parser.add_argument("--start-from", type=Path, help="a model folder whose weights are the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    train(parser.parse_args())


def train(args: argparse.Namespace) -> None:
    """One run; see the options."""
    end_s = time.monotonic() + args.run_s
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.state.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    data = _training_set(args)
    print(f"{len(data.scenes)} scenes", flush=True)
    scenes = data.scenes.to(device)
    model = components.build(args.seed)
    if args.start_from:
        components.copy_weights(components.load(args.start_from), model)
    autoencoder = _autoencoder_stage(model, device, args.autoencoder_s)
    _resume(autoencoder, args.state / "autoencoder.safetensors")
    if not autoencoder.finished:
        train_autoencoder.train(
            autoencoder,
            model.vae,
            scenes,
            batch_size=args.autoencoder_batch,
            run_s=end_s - time.monotonic(),
            compiled=not args.no_compile,
        )
        autoencoder.save(args.state / "autoencoder.safetensors")
    autoencoder.use_average()
    latents = _latents(model, data, scenes, device, compiled=not args.no_compile)
    denoiser = _denoiser_stage(model, device, args.denoiser_s, args.denoiser_lr)
    _resume(denoiser, args.state / "denoiser.safetensors")
    train_denoiser.train(
        denoiser,
        latents,
        batch_size=args.denoiser_batch,
        run_s=end_s - time.monotonic(),
        compiled=not args.no_compile,
    )
    denoiser.save(args.state / "denoiser.safetensors")
    denoiser.use_average()
    components.save(model, args.out)
    print(
        f"autoencoder {autoencoder.step} steps {autoencoder.seconds:.0f} s, "
        f"denoiser {denoiser.step} steps {denoiser.seconds:.0f} s of {denoiser.planned_s:.0f}",
        flush=True,
    )


def _training_set(args: argparse.Namespace) -> TrainingSet:
    path: Path = args.state / "scenes.safetensors"
    if not path.exists():
        sample_training_set(args.scenes, args.captions, args.seed, args.processes).save(path)
    return TrainingSet.load(path)


def _autoencoder_stage(model: Components, device: torch.device, planned_s: float) -> Stage:
    modules = nn.ModuleDict({"vae": model.vae.to(device)})
    return Stage(modules, peak_lr=8e-4, ema_decay=0.998, planned_s=planned_s)


def _denoiser_stage(model: Components, device: torch.device, planned_s: float, peak_lr: float) -> Stage:
    model.text_encoder.model.visual.requires_grad_(False)
    modules = nn.ModuleDict(
        {"text_encoder": model.text_encoder.to(device), "transformer": model.transformer.to(device)}
    )
    return Stage(modules, peak_lr=peak_lr, ema_decay=0.9995, planned_s=planned_s)


def _resume(stage: Stage, path: Path) -> None:
    if path.exists():
        stage.resume(path)


def _latents(
    model: Components, data: TrainingSet, scenes: SceneBatch, device: torch.device, *, compiled: bool
) -> train_denoiser.LatentSet:
    """Encodes all scenes and writes the latents' statistics into the autoencoder's config."""
    latents, mean, std = train_autoencoder.encode_all(model.vae, scenes, batch_size=256, compiled=compiled)
    model.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    empty_tokens, empty_lengths = tokenize(model.tokenizer, EMPTY_PROMPTS)
    return train_denoiser.LatentSet(
        latents=latents,
        weights=patch_weights(scenes),
        tokens=data.tokens.to(device),
        lengths=data.lengths.to(device),
        prefix=torch.tensor(model.tokenizer(IMAGE_PREFIX)["input_ids"], device=device),
        empty_tokens=empty_tokens.to(device),
        empty_lengths=empty_lengths.to(device),
    )


if __name__ == "__main__":
    main()
