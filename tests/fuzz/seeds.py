"""The first inputs of the fuzzers: what is right, so that they need not find the formats themselves."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import torch
from PIL import Image

from services.media import PICTURE_FORMATS
from services.tensors import bundle_frames


def write_seeds(target: str, folder: Path) -> None:
    """Writes them into a folder."""
    made = {"tensor_frames": _tensor_frames, "picture": _pictures}[target]()
    for name, data in made.items():
        (folder / f"seed-{name}").write_bytes(data)


def _tensor_frames() -> dict[str, bytes]:
    tensors = {
        "a": torch.arange(12, dtype=torch.float32).view(3, 4),
        "b": torch.zeros(2, 0, dtype=torch.bool),
        "c": torch.ones(7, dtype=torch.bfloat16),
    }
    kinds = {"chunks": bundle_frames(tensors, {"step": "3"}), "whole": bundle_frames(tensors, whole_bytes=1 << 16)}
    return {
        name: b"".join(struct.pack("<H", len(message)) + message for message in messages)
        for name, messages in kinds.items()
    }


def _pictures() -> dict[str, bytes]:
    made = {}
    image = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in PICTURE_FORMATS:
        file = io.BytesIO()
        image.save(file, kind, exif=exif)
        made[kind.lower()] = file.getvalue()
    return made
