"""Scenes as tensors: sampled by many processes, tokenised, and painted in batches on a GPU.

Called by training only. The formulas of the shapes are those of demo.scenes.
"""

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from demo.captions import training_pair
from demo.scenes import IMAGE_SIZE_PX, PALETTE, SHAPES, Scene, signed_distance
from demo.tokenizer import SUFFIX, build_tokenizer

MAX_OBJECTS = 3
MAX_TOKENS = 64
"""Longest caption with the template's suffix, rounded up to what attention kernels like."""
PATCH_PX = 16
_CHUNK = 2_000


@dataclass(slots=True)
class SceneBatch:
    """Scenes as numbers.

    Shapes: N scenes, 3 object slots. shape, colour: (N, 3) indices, shape -1 for an empty slot;
    radius, x, y: (N, 3) pixels; background: (N,).
    """

    shape: torch.Tensor
    colour: torch.Tensor
    radius: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    background: torch.Tensor

    def __len__(self) -> int:
        return len(self.background)

    def __getitem__(self, rows: "slice | torch.Tensor") -> "SceneBatch":
        return SceneBatch(*(getattr(self, f.name)[rows] for f in fields(self)))

    def to(self, device: torch.device) -> "SceneBatch":
        return SceneBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(slots=True)
class TrainingSet:
    """Scenes with their captions: tokens (N, captions, 64) padded after the suffix, lengths (N, captions)."""

    scenes: SceneBatch
    tokens: torch.Tensor
    lengths: torch.Tensor

    def save(self, path: Path) -> None:
        tensors = {f.name: getattr(self.scenes, f.name).contiguous() for f in fields(SceneBatch)}
        save_file({**tensors, "tokens": self.tokens, "lengths": self.lengths}, path)

    @staticmethod
    def load(path: Path) -> "TrainingSet":
        tensors = load_file(path)
        scenes = SceneBatch(*(tensors[f.name] for f in fields(SceneBatch)))
        return TrainingSet(scenes, tensors["tokens"], tensors["lengths"])


def batch_of(scenes: Sequence[Scene]) -> SceneBatch:
    """Pack scenes into tensors."""
    numbers = np.zeros((len(scenes), MAX_OBJECTS, 5), np.float32)
    numbers[..., 0], numbers[..., 2] = -1, 1
    colours = list(PALETTE)
    for row, scene in zip(numbers, scenes, strict=True):
        for slot, item in zip(row, scene.objects, strict=False):
            slot[:] = SHAPES.index(item.shape), colours.index(item.colour), item.radius_px, item.x, item.y
    background = torch.tensor([colours.index(scene.background) for scene in scenes])
    shape, colour, radius, x, y = torch.from_numpy(numbers).unbind(-1)
    return SceneBatch(shape.long(), colour.long(), radius, x, y, background)


def sample_training_set(num_scenes: int, num_captions: int, seed: int, processes: int) -> TrainingSet:
    """Draw training scenes and captions; the same for the same arguments whatever the number of processes."""
    chunks = [
        (min(_CHUNK, num_scenes - start), num_captions, seed * 1_000_003 + start)
        for start in range(0, num_scenes, _CHUNK)
    ]
    if processes > 1:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            parts = pool.map(_sample_chunk, chunks, chunksize=1)
    else:
        parts = [_sample_chunk(chunk) for chunk in chunks]
    stacked = [torch.cat([torch.from_numpy(part[i]) for part in parts]) for i in range(8)]
    return TrainingSet(SceneBatch(*stacked[:6]), stacked[6], stacked[7])


def tokenize(tokenizer: Qwen2Tokenizer, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with the template's suffix, without its prefix: padded tokens (N, 64) and lengths (N,)."""
    encoded = tokenizer([prompt + SUFFIX for prompt in prompts])["input_ids"]
    tokens = torch.full((len(encoded), MAX_TOKENS), tokenizer.pad_token_id, dtype=torch.int16)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int16)
    return tokens, torch.tensor([len(ids) for ids in encoded], dtype=torch.int16)


def _sample_chunk(chunk: tuple[int, int, int]) -> tuple[np.ndarray, ...]:
    torch.set_num_threads(1)
    num_scenes, num_captions, seed = chunk
    rng = Random(seed)
    pairs = [training_pair(rng, num_captions) for _ in range(num_scenes)]
    tokens, lengths = tokenize(build_tokenizer(), [caption.text for _, captions in pairs for caption in captions])
    scenes = batch_of([scene for scene, _ in pairs])
    arrays = [getattr(scenes, f.name).numpy() for f in fields(SceneBatch)]
    shaped = (tokens.view(num_scenes, num_captions, -1).numpy(), lengths.view(num_scenes, num_captions).numpy())
    return (*arrays, *shaped)


def paint(scenes: SceneBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Paint a batch as demo.scenes.draw does.

    Returns: images (N, 3, 256, 256) in [-1, 1], and weights (N, 1, 256, 256) which are high on objects and just
    around them, the more so the smaller the object.
    """
    device = scenes.background.device
    palette = torch.tensor(list(PALETTE.values()), dtype=torch.float32, device=device) / 127.5 - 1.0
    centres = torch.arange(IMAGE_SIZE_PX, device=device) + 0.5
    image = palette[scenes.background][:, :, None, None]
    weight = torch.ones((), device=device)
    for slot in range(MAX_OBJECTS):
        radius = scenes.radius[:, slot, None, None]
        x = (centres[None, None, :] - scenes.x[:, slot, None, None]) / radius
        y = (centres[None, :, None] - scenes.y[:, slot, None, None]) / radius
        distance = torch.full_like(x + y, 100.0)
        for index, shape in enumerate(SHAPES):
            chosen = scenes.shape[:, slot, None, None] == index
            distance = torch.where(chosen, signed_distance(shape, x, y, torch), distance)
        distance = (distance * radius)[:, None]
        coverage = torch.clip(0.5 - distance, 0.0, 1.0)
        image = image * (1 - coverage) + palette[scenes.colour[:, slot]][:, :, None, None] * coverage
        closeness = torch.clip(1.0 - distance / 6.0, 0.0, 1.0)
        weight = weight + 3.0 * (34.0 / radius[:, None]) ** 2 * closeness
    return image, weight


def patch_weights(scenes: SceneBatch, batch_size: int = 256) -> torch.Tensor:
    """How much every 16 px patch of a scene counts, row by row: (N, 256) in fp16, 1 on average for each scene."""
    parts = []
    for start in range(0, len(scenes), batch_size):
        weight = nn.functional.avg_pool2d(paint(scenes[start : start + batch_size])[1], PATCH_PX).flatten(1)
        parts.append((weight / weight.mean(1, keepdim=True)).half())
    return torch.cat(parts)
