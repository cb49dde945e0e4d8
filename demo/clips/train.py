"""Trains the demo's video model: `python -m demo.clips.train --state DIR --out DIR`.

Draws scenes in motion and captions, trains the autoencoder, which starts as the picture model's, encodes the clips,
trains first the text encoder and then the transformer, and writes the folder in the Wan format. A run ends after
`--run-s` seconds; the same command then goes on where it stopped. Where the state was lost, `--start-from` goes on from
the weights of a written folder.
On several GPUs of a machine, each with batches of its own: `torchrun --standalone --nproc-per-node 4 -m ...`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from demo import ranks
from demo.clips import components, train_autoencoder, train_denoiser, train_text
from demo.clips.batches import MovingBatch, batch_of
from demo.clips.captions import training_pair
from demo.clips.components import WanComponents
from demo.clips.scenes import PATHS, SIZES_PX, SPEEDS_PX
from demo.clips.train_denoiser import LatentClips
from demo.ranks import Ranks
from demo.scenes import PALETTE, SHAPES
from demo.stage import Stage, save_tensors

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
    parser.add_argument("--start-from", type=Path, help="folder of a model whose weights are the start")
    parser.add_argument("--clips", type=int, default=120_000)
    parser.add_argument("--captions", type=int, default=8, help="captions for each clip")
    parser.add_argument("--processes", type=int, default=16, help="processes that draw scenes")
    parser.add_argument("--run-s", type=float, default=540.0, help="seconds after which this run ends")
    parser.add_argument("--autoencoder-s", type=float, default=240.0, help="seconds of training in all; 0: as it is")
    parser.add_argument("--text-s", type=float, default=15.0, help="as above")
    parser.add_argument("--denoiser-s", type=float, default=600.0, help="as above; 0: only the autoencoder is trained")
    parser.add_argument("--autoencoder-batch", type=int, default=8)
    parser.add_argument("--autoencoder-lr", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument("--denoiser-batch", type=int, default=256)
    parser.add_argument("--denoiser-lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--encode-batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    train(parser.parse_args())


def train(args: argparse.Namespace) -> None:
    """One run; see the options."""
    run = _Run(args, time.monotonic(), ranks.join())
    torch.backends.cuda.matmul.allow_tf32 = True
    args.state.mkdir(parents=True, exist_ok=True)
    if run.ranks.rank == 0:
        _draw_training_set(args)
    run.ranks.meet()  # It is drawn by now, for all.
    scenes, tokens, lengths = _training_set(run)
    model = components.build(args.seed)
    components.copy_picture_autoencoder(model.vae)
    if args.start_from:
        components.copy_weights(model, args.start_from)
    for module in (model.vae, model.text_encoder, model.transformer):
        module.to(run.device)
    run.say(f"{len(scenes)} scenes")
    autoencoder = _train_autoencoder(run, model, scenes)
    if args.denoiser_s > 0:
        ready = autoencoder.finished and _train_text_encoder(run, model, scenes, tokens, lengths)
        _train_denoiser(run, model, scenes, tokens, lengths, autoencoder.step if ready else None)
    ranks.leave()
    if run.ranks.rank == 0:
        components.save(model, args.out)
        run.say(f"saved in {args.out}")


@dataclass(slots=True)
class _Run:
    """The options, when the run began and the processes that train."""

    args: argparse.Namespace
    begun_s: float
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    def left_s(self) -> float:
        """By the clock of rank 0; all ranks must ask."""
        return self.ranks.first(max(0.0, self.begun_s + float(self.args.run_s) - time.monotonic()))

    @property
    def compiled(self) -> bool:
        return not self.args.no_compile

    def say(self, what: str) -> None:
        if self.ranks.rank == 0:
            print(f"{time.monotonic() - self.begun_s:.0f} s: {what}", flush=True)

    def resume(self, stage: Stage, name: str) -> None:
        """Goes on where an earlier run has left the stage, with draws of this rank's own."""
        if self._path(name).exists():
            stage.resume(self._path(name))
        torch.manual_seed(self.ranks.seed(self.args.seed + stage.step))
        self.ranks.meet()  # None saves before all have read.

    def save(self, stage: Stage, name: str) -> None:
        """For a later run."""
        if self.ranks.rank == 0:
            stage.save(self._path(name))

    def _path(self, name: str) -> Path:
        path: Path = self.args.state / f"wan_{name}.safetensors"
        return path


def _train_autoencoder(run: _Run, model: WanComponents, scenes: MovingBatch) -> Stage:
    """How far it is; the model then holds the average, its latents evened out where they were trained."""
    modules = nn.ModuleDict({"vae": model.vae})
    stage = Stage(
        modules, peak_lr=run.args.autoencoder_lr, ema_decay=0.995, planned_s=run.args.autoencoder_s, ranks=run.ranks
    )
    run.resume(stage, "autoencoder")
    if not stage.finished:
        batch_size: int = run.args.autoencoder_batch
        train_autoencoder.train(
            stage, model.vae, scenes, batch_size=batch_size, run_s=run.left_s(), compiled=run.compiled
        )
        run.save(stage, "autoencoder")
    stage.use_average()
    if stage.finished and stage.step > 0:
        train_autoencoder.even_out(model.vae, scenes, batch_size=run.args.encode_batch, ranks=run.ranks)
    run.say(f"autoencoder: {stage.step} steps, {stage.seconds:.0f} s of {stage.planned_s:.0f}")
    return stage


def _train_text_encoder(
    run: _Run, model: WanComponents, scenes: MovingBatch, tokens: torch.Tensor, lengths: torch.Tensor
) -> bool:
    """Whether it is done; the model then holds the average."""
    num_classes = [len(SHAPES), len(PALETTE), len(PALETTE), len(PATHS), len(SIZES_PX), len(SPEEDS_PX)]
    torch.manual_seed(run.args.seed)  # Of the reader's weights: the same on all ranks.
    reader = train_text.Reader(components.TEXT_WIDTH, num_classes).to(run.device)
    modules = nn.ModuleDict({"text_encoder": model.text_encoder, "reader": reader})
    stage = Stage(modules, peak_lr=1e-3, ema_decay=0.99, planned_s=run.args.text_s, ranks=run.ranks)
    run.resume(stage, "text")
    if not stage.finished:
        right = train_text.train(
            stage, tokens, lengths, train_text.labels_of(scenes), batch_size=256, run_s=run.left_s()
        )
        run.save(stage, "text")
        run.say(f"text encoder: {stage.step} steps, told right: {[round(share, 2) for share in right.tolist()]}")
    stage.use_average()
    return stage.finished


def _train_denoiser(
    run: _Run,
    model: WanComponents,
    scenes: MovingBatch,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    autoencoder_step: int | None,
) -> None:
    """Trains where what it needs is ready, and so the autoencoder has a step; the model then holds the average."""
    modules = train_denoiser.modules_of(model.text_encoder, model.transformer)
    stage = Stage(
        modules, peak_lr=run.args.denoiser_lr, ema_decay=0.9992, planned_s=run.args.denoiser_s, ranks=run.ranks
    )
    run.resume(stage, "denoiser")
    if autoencoder_step is not None:
        clips = _latents(run, model, scenes, tokens, lengths, autoencoder_step)
        run.say("clips are encoded")
        train_denoiser.train(
            stage, clips, batch_size=run.args.denoiser_batch, run_s=run.left_s(), compiled=run.compiled
        )
        run.save(stage, "denoiser")
    stage.use_average()
    run.say(f"denoiser: {stage.step} steps, {stage.seconds:.0f} s of {stage.planned_s:.0f}")


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


def _scenes_file(args: argparse.Namespace) -> Path:
    path: Path = args.state / "moving_scenes.safetensors"
    return path


def _draw_training_set(args: argparse.Namespace) -> None:
    """Writes it where an earlier run has not; the same whatever the number of processes."""
    path = _scenes_file(args)
    if path.exists():
        return
    starts = range(0, args.clips, _CHUNK)
    chunks = [(min(_CHUNK, args.clips - at), args.captions, args.seed * 1_000_003 + at) for at in starts]
    if args.processes > 1:
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            parts = pool.map(_sample_chunk, chunks, chunksize=1)
    else:
        parts = [_sample_chunk(chunk) for chunk in chunks]
    save_file({name: torch.cat([torch.from_numpy(part[name]) for part in parts]) for name in parts[0]}, path)


def _training_set(run: _Run) -> tuple[MovingBatch, torch.Tensor, torch.Tensor]:
    """This rank's part on its device: scenes, tokens (N, captions, 48) and lengths (N, captions)."""
    part = slice(run.ranks.rank, None, run.ranks.size)
    tensors = {name: tensor[part].to(run.device) for name, tensor in load_file(_scenes_file(run.args)).items()}
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


def _latents(
    run: _Run,
    model: WanComponents,
    scenes: MovingBatch,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    autoencoder_step: int,
) -> LatentClips:
    """This rank's encoded clips, those of an earlier run where the autoencoder has had as many steps.

    Writes the statistics of all latents into the autoencoder's config.
    """
    name = f"latents_{len(scenes)}_step_{autoencoder_step}_{run.ranks.rank}_of_{run.ranks.size}.safetensors"
    path: Path = run.args.state / name
    there = torch.tensor(float(path.exists()), device=run.device)
    run.ranks.average([there])
    if there == 1.0:  # All ranks have theirs: encoding is work of all.
        encoded = load_file(path, device=str(run.device))
    else:
        encoded = train_autoencoder.encode_all(
            model.vae, scenes, batch_size=run.args.encode_batch, compiled=run.compiled, ranks=run.ranks
        )
        save_tensors(encoded, path)
    latents, weights = encoded["latents"], encoded["weights"]
    model.vae.register_to_config(latents_mean=encoded["mean"].tolist(), latents_std=encoded["std"].tolist())
    device = latents.device
    empty_tokens, empty_lengths = tokenize(model.tokenizer, EMPTY_PROMPTS)
    return LatentClips(
        latents=latents,
        weights=weights,
        tokens=tokens,
        lengths=lengths,
        empty_tokens=empty_tokens.to(device),
        empty_lengths=empty_lengths.to(device),
    )


if __name__ == "__main__":
    main()
