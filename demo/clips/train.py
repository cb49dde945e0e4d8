"""Trains the demo's video model: `python -m demo.clips.train --state DIR --out DIR`.

Draws scenes in motion and captions, trains the autoencoder, encodes the clips, trains text encoder and transformer, and
writes the folder in the Wan format. A run ends after `--run-s` seconds; the same command then goes on where it stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from demo.clips import components, train_autoencoder, train_denoiser
from demo.clips.batches import MovingBatch, batch_of
from demo.clips.captions import training_pair
from demo.clips.components import WanComponents
from demo.clips.train_denoiser import LatentClips
from demo.stage import Stage

MAX_TOKENS = 48
"""Above every caption's length, and what attention kernels like."""
EMPTY_PROMPTS = ("", " ", "？")
"""The last one is what any prompt without a known word looks like, the family's own negative prompt too."""
_CHUNK = 2_000


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True, help="folder for what a later run goes on with")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--clips", type=int, default=40_000)
    parser.add_argument("--captions", type=int, default=8, help="captions for each clip")
    parser.add_argument("--processes", type=int, default=16, help="processes that draw scenes")
    parser.add_argument("--run-s", type=float, default=540.0, help="seconds after which this run ends")
    parser.add_argument("--autoencoder-s", type=float, default=300.0, help="seconds of training in all")
    parser.add_argument("--denoiser-s", type=float, default=600.0, help="as above; 0: only the autoencoder is trained")
    parser.add_argument("--autoencoder-batch", type=int, default=8)
    parser.add_argument("--denoiser-batch", type=int, default=256)
    parser.add_argument("--denoiser-lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--encode-batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    train(parser.parse_args())


def train(args: argparse.Namespace) -> None:
    """One run; see the options."""
    begun_s = time.monotonic()
    end_s, compiled = begun_s + args.run_s, not args.no_compile
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    args.state.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    scenes, tokens, lengths = _training_set(args)
    scenes = scenes.to(device)
    model = components.build(args.seed)

    def say(what: str) -> None:
        print(f"{time.monotonic() - begun_s:.0f} s: {what}", flush=True)

    say(f"{len(scenes)} scenes")
    autoencoder = Stage(
        nn.ModuleDict({"vae": model.vae.to(device)}), peak_lr=8e-4, ema_decay=0.995, planned_s=args.autoencoder_s
    )
    path = args.state / "wan_autoencoder.safetensors"
    _resume(autoencoder, path)
    if not autoencoder.finished:
        train_autoencoder.train(
            autoencoder,
            model.vae,
            scenes,
            batch_size=args.autoencoder_batch,
            run_s=end_s - time.monotonic(),
            compiled=compiled,
        )
        autoencoder.save(path)
    autoencoder.use_average()
    say(f"autoencoder: {autoencoder.step} steps, {autoencoder.seconds:.0f} s of {autoencoder.planned_s:.0f}")
    if args.denoiser_s <= 0:
        return
    denoiser = _denoiser_stage(model, device, args)
    path = args.state / "wan_denoiser.safetensors"
    _resume(denoiser, path)
    if autoencoder.finished:
        clips = _latents(model, scenes, tokens, lengths, args.encode_batch, compiled=compiled)
        say("clips are encoded")
        train_denoiser.train(
            denoiser, clips, batch_size=args.denoiser_batch, run_s=end_s - time.monotonic(), compiled=compiled
        )
        denoiser.save(path)
    denoiser.use_average()
    say(f"denoiser: {denoiser.step} steps, {denoiser.seconds:.0f} s of {denoiser.planned_s:.0f}")
    components.save(model, args.out)
    say(f"saved in {args.out}")


def tokenize(tokenizer: T5Tokenizer, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with the end of text: padded tokens (N, 48) and lengths (N,).

    Raises: ValueError when one is so long that no padding would be left.
    """
    encoded = tokenizer(list(prompts))["input_ids"]
    tokens = torch.full((len(encoded), MAX_TOKENS), tokenizer.pad_token_id, dtype=torch.int16)
    for row, ids, prompt in zip(tokens, encoded, prompts, strict=True):
        if len(ids) >= MAX_TOKENS:
            raise ValueError(f"{len(ids)} tokens, at most {MAX_TOKENS - 1} can be trained: {prompt!r}")
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int16)
    return tokens, torch.tensor([len(ids) for ids in encoded], dtype=torch.int16)


def _training_set(args: argparse.Namespace) -> tuple[MovingBatch, torch.Tensor, torch.Tensor]:
    """Scenes, tokens (N, captions, 48) and lengths (N, captions); the same whatever the number of processes."""
    path: Path = args.state / "moving_scenes.safetensors"
    if not path.exists():
        starts = range(0, args.clips, _CHUNK)
        chunks = [(min(_CHUNK, args.clips - at), args.captions, args.seed * 1_000_003 + at) for at in starts]
        if args.processes > 1:
            with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
                parts = pool.map(_sample_chunk, chunks, chunksize=1)
        else:
            parts = [_sample_chunk(chunk) for chunk in chunks]
        save_file({name: torch.cat([torch.from_numpy(part[name]) for part in parts]) for name in parts[0]}, path)
    tensors = load_file(path)
    return MovingBatch(*(tensors[f.name] for f in fields(MovingBatch))), tensors["tokens"], tensors["lengths"]


def _sample_chunk(chunk: tuple[int, int, int]) -> dict[str, object]:
    """Numpy arrays by name: tensors would travel between processes as open files."""
    torch.set_num_threads(1)
    num_scenes, num_captions, seed = chunk
    rng = Random(seed)
    pairs = [training_pair(rng, num_captions) for _ in range(num_scenes)]
    texts = [caption.text for _, captions in pairs for caption in captions]
    tokens, lengths = tokenize(components.build_tokenizer(), texts)
    scenes = batch_of([scene for scene, _ in pairs])
    arrays: dict[str, object] = {f.name: getattr(scenes, f.name).contiguous().numpy() for f in fields(MovingBatch)}
    arrays["tokens"] = tokens.view(num_scenes, num_captions, -1).numpy()
    arrays["lengths"] = lengths.view(num_scenes, num_captions).numpy()
    return arrays


def _denoiser_stage(model: WanComponents, device: torch.device, args: argparse.Namespace) -> Stage:
    modules = nn.ModuleDict(
        {"text_encoder": model.text_encoder.to(device), "transformer": model.transformer.to(device)}
    )
    return Stage(modules, peak_lr=args.denoiser_lr, ema_decay=0.9992, planned_s=args.denoiser_s)


def _resume(stage: Stage, path: Path) -> None:
    if path.exists():
        stage.resume(path)


def _latents(
    model: WanComponents,
    scenes: MovingBatch,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    batch_size: int,
    *,
    compiled: bool,
) -> LatentClips:
    """Encodes all clips and writes the latents' statistics into the autoencoder's config."""
    latents, mean, std, weights = train_autoencoder.encode_all(
        model.vae, scenes, batch_size=batch_size, compiled=compiled
    )
    model.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    device = latents.device
    empty_tokens, empty_lengths = tokenize(model.tokenizer, EMPTY_PROMPTS)
    return LatentClips(
        latents=latents,
        weights=weights,
        tokens=tokens.to(device),
        lengths=lengths.to(device),
        empty_tokens=empty_tokens.to(device),
        empty_lengths=empty_lengths.to(device),
    )


if __name__ == "__main__":
    main()
