"""Latents as the transformer and the VAE lay them out: packed [B, S, 4 C] in patches of 2 x 2, and spread out."""

from __future__ import annotations

import torch

PATCH = 2

Grid = tuple[int, int]  # rows and columns of patches


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B, S, 4 C], S = (h/2) (w/2); a patch lies channel by channel, then row by row."""
    patches = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    # [B, C, rows, 2, columns, 2] -> [B, rows, columns, C, 2, 2]
    packed: torch.Tensor = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return packed


def unpack(latents: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[B, S, 4 C] -> [B, C, h, w]."""
    patches = latents.unflatten(1, grid).unflatten(3, (-1, PATCH, PATCH))
    # [B, rows, columns, C, 2, 2] -> [B, C, rows, 2, columns, 2]
    spread: torch.Tensor = patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return spread
