"""Latents as the transformer and the VAE lay them out: packed [B, S, 4 C] in patches of 2 x 2, and spread out."""

from __future__ import annotations

import torch

PATCH = 2


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, H/8, W/8] -> [B, S, 4 C]."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // PATCH) * (width // PATCH), channels * PATCH * PATCH)


def unpack(latents: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """[B, S, 4 C] -> [B, C, F, H/8, W/8]; `grid` counts patches: frames (layers), rows, columns."""
    frames, rows, columns = grid
    batch, _, width = latents.shape
    channels = width // (PATCH * PATCH)
    spread = latents.view(batch, frames, rows, columns, channels, PATCH, PATCH).permute(0, 4, 1, 2, 5, 3, 6)
    return spread.reshape(batch, channels, frames, rows * PATCH, columns * PATCH)
