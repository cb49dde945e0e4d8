"""What a VAE does between its convolutions as Triton kernels: each reads a picture once and writes it once.

See `vae_kernels` for what they compute. With the channels last a picture or clip is rows of C numbers, one after the
other; a program takes a tile of some rows with all their channels. Arithmetic is in float32. Sizes of pictures are not
specialised on, so that few kernels are compiled; strides are: where 16 divides them, stores are of 16 bytes, not of 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn

from services.vae_kernels import Gather

# Numbers in a program's tile.
TILE = 4096
# Channels and rows of a tile whose moments are taken; at most so many partial moments of a channel.
MOMENT_CHANNELS = 64
MOMENT_ROWS = 128
MAX_BLOCKS = 1024
# Tiles that a program norms by what it made of the moments once.
NORM_TILES = 4


@triton.jit(do_not_specialize=("rows", "height", "width"))  # type: ignore[untyped-decorator]
def _rms_norm_silu(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0913
    x,  # noqa: ANN001
    bias,  # noqa: ANN001
    gamma,  # noqa: ANN001
    out,  # noqa: ANN001
    rows,  # noqa: ANN001
    height,  # noqa: ANN001
    width,  # noqa: ANN001
    batch_stride,  # noqa: ANN001
    frame_stride,  # noqa: ANN001
    line_stride,  # noqa: ANN001
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (row < rows) & (channel < C)
    values = tl.load(x + (batch * rows + row) * C + channel, mask=inside, other=0.0).to(tl.float32)
    # Weights are read for every row, out of the cache: so they come in the layout of the tile.
    if bias is not None:
        values += tl.load(tl.broadcast_to(bias + channel, (ROWS, CHANNELS)), mask=inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(values * values, axis=1, keep_dims=True))
    root = tl.sqrt(tl.full((1, 1), C, tl.float32))
    weight = tl.load(tl.broadcast_to(gamma + channel, (ROWS, CHANNELS)), mask=inside, other=0.0).to(tl.float32)
    normed = values * (root / tl.maximum(length, 1e-12)) * weight
    line = row // width
    frame = line // height
    target = batch * batch_stride + frame.to(tl.int64) * frame_stride
    target += (line - frame * height).to(tl.int64) * line_stride + (row - line * width) * C
    tl.store(out + target + channel, normed * tl.sigmoid(normed), mask=inside)


@triton.jit(do_not_specialize=("rows", "tiles"))  # type: ignore[untyped-decorator]
def _moments(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0913
    x,  # noqa: ANN001
    means,  # noqa: ANN001
    squares,  # noqa: ANN001
    rows,  # noqa: ANN001
    tiles,  # noqa: ANN001
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    mean = tl.zeros((1, CHANNELS), tl.float32)
    square = tl.zeros((1, CHANNELS), tl.float32)
    for tile in range(tiles):
        first = (tl.program_id(0) * tiles + tile) * ROWS
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (channel < C)
        values = tl.load(x + (batch * rows + row) * C + channel, mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(tl.maximum(rows - first, 0), ROWS).to(tl.float32)
        tile_mean = tl.sum(values, axis=0, keep_dims=True) / tl.maximum(count, 1.0)
        apart = tl.where(inside, values - tile_mean, 0.0)
        # Chan et al.: sums of squares about each part's own mean lose no digits. Tiles before this one are full.
        before = tile * tl.full((), ROWS, tl.float32)
        share = count / (before + count)
        delta = tile_mean - mean
        square += tl.sum(apart * apart, axis=0, keep_dims=True) + delta * delta * before * share
        mean += delta * share
    partial = (batch * tl.num_programs(0) + tl.program_id(0)) * C + channel
    tl.store(means + partial, mean, mask=channel < C)
    tl.store(squares + partial, square, mask=channel < C)


@triton.jit(do_not_specialize=("blocks", "rows", "block_rows"))  # type: ignore[untyped-decorator]
def _group_moments(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0913
    means,  # noqa: ANN001
    squares,  # noqa: ANN001
    bias,  # noqa: ANN001
    group_means,  # noqa: ANN001
    variances,  # noqa: ANN001
    blocks,  # noqa: ANN001
    rows,  # noqa: ANN001
    block_rows,  # noqa: ANN001
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    batch = tl.program_id(1)
    lane = tl.arange(0, CHANNELS)[None, :]
    channel = tl.program_id(0) * WIDTH + lane
    before = tl.zeros((1, CHANNELS), tl.float32)
    if bias is not None:
        before = tl.load(bias + channel, mask=lane < WIDTH, other=0.0).to(tl.float32)
    total = rows.to(tl.float32) * WIDTH
    sums = tl.zeros((BLOCKS, CHANNELS), tl.float32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)[:, None]
        inside = (block < blocks) & (lane < WIDTH)
        count = tl.minimum(rows - block * block_rows, block_rows).to(tl.float32)
        values = tl.load(means + (batch * blocks + block) * C + channel, mask=inside, other=0.0) + before
        sums += tl.where(inside, values * count, 0.0)
    mean = tl.sum(sums) / total
    sums = tl.zeros((BLOCKS, CHANNELS), tl.float32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)[:, None]
        inside = (block < blocks) & (lane < WIDTH)
        count = tl.minimum(rows - block * block_rows, block_rows).to(tl.float32)
        partial = (batch * blocks + block) * C + channel
        apart = tl.load(means + partial, mask=inside, other=0.0) + before - mean
        sums += tl.where(inside, tl.load(squares + partial, mask=inside, other=0.0) + apart * apart * count, 0.0)
    group = batch * tl.num_programs(0) + tl.program_id(0)
    tl.store(group_means + group, mean)
    tl.store(variances + group, tl.sum(sums) / total)


@triton.jit(do_not_specialize=("rows", "width"))  # type: ignore[untyped-decorator]
def _group_norm_silu(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0913
    x,  # noqa: ANN001
    bias,  # noqa: ANN001
    moments,  # noqa: ANN001
    shares,  # noqa: ANN001
    weight,  # noqa: ANN001
    offset,  # noqa: ANN001
    out,  # noqa: ANN001
    rows,  # noqa: ANN001
    width,  # noqa: ANN001
    batch_stride,  # noqa: ANN001
    line_stride,  # noqa: ANN001
    eps,  # noqa: ANN001
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CHANNELS)[None, :]
    # Of pieces [n, 2, B, G]; those of a group come to each of its channels.
    count = tl.num_programs(1) * GROUPS
    group = moments + batch * GROUPS + channel // (C // GROUPS)
    mean = tl.zeros((1, CHANNELS), tl.float32)
    for piece in tl.static_range(len(shares)):
        mean += shares[piece] * tl.load(group + 2 * piece * count, mask=channel < C, other=0.0)
    variance = tl.zeros((1, CHANNELS), tl.float32)
    for piece in tl.static_range(len(shares)):
        apart = tl.load(group + 2 * piece * count, mask=channel < C, other=0.0) - mean
        own = tl.load(group + (2 * piece + 1) * count, mask=channel < C, other=0.0)
        variance += shares[piece] * (own + apart * apart)
    scale = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    if bias is not None:
        mean -= tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    shift = tl.load(offset + channel, mask=channel < C, other=0.0).to(tl.float32) - mean * scale
    for tile in range(TILES):
        row = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (channel < C)
        values = tl.load(x + (batch * rows + row) * C + channel, mask=inside, other=0.0).to(tl.float32)
        normed = values * scale + shift
        line = row // width
        target = batch * batch_stride + line.to(tl.int64) * line_stride + (row - line * width) * C
        tl.store(out + target + channel, normed * tl.sigmoid(normed), mask=inside)


@triton.jit(do_not_specialize=("rows",))  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0913
    shortcut,  # noqa: ANN001
    x,  # noqa: ANN001
    bias,  # noqa: ANN001
    out,  # noqa: ANN001
    rows,  # noqa: ANN001
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (row < rows) & (channel < C)
    offsets = row * C + channel
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    values += tl.load(shortcut + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, values, mask=inside)


@triton.jit(do_not_specialize=("rows", "height", "width"))  # type: ignore[untyped-decorator]
def _double(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0913
    x,  # noqa: ANN001
    out,  # noqa: ANN001
    rows,  # noqa: ANN001
    height,  # noqa: ANN001
    width,  # noqa: ANN001
    batch_stride,  # noqa: ANN001
    line_stride,  # noqa: ANN001
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (row < rows) & (channel < C)
    values = tl.load(x + row.to(tl.int64) * C + channel, mask=inside)
    line = row // width
    batch = line // height
    # Two lines of the result for one, and two rows of channels for one.
    first = batch.to(tl.int64) * batch_stride + (line - batch * height).to(tl.int64) * 2 * line_stride
    first += (row - line * width) * 2 * C + channel
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            tl.store(out + first + down * line_stride + right * C, values, mask=inside)


@triton.jit(do_not_specialize=("rows", "picture", "frames"))  # type: ignore[untyped-decorator]
def _side_by_side(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0913
    clip,  # noqa: ANN001
    out,  # noqa: ANN001
    rows,  # noqa: ANN001
    picture,  # noqa: ANN001
    frames,  # noqa: ANN001
    C: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (row < rows) & (channel < C)
    values = tl.load(clip + (batch * rows + row) * C + channel, mask=inside)
    frame = row // picture
    for place in tl.static_range(COUNT):
        wanted = inside & (frame >= place) & (frame - place < frames)
        target = batch * frames * picture + row - place * picture
        tl.store(out + (target * COUNT + place) * C + channel, values, mask=wanted)


@triton.jit(do_not_specialize=("count",))  # type: ignore[untyped-decorator]
def _softmax(  # type: ignore[no-untyped-def]  # noqa: ANN202
    scores,  # noqa: ANN001
    out,  # noqa: ANN001
    count,  # noqa: ANN001
    scale,  # noqa: ANN001
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * count
    lane = tl.arange(0, BLOCK)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, count, BLOCK):
        inside = first + lane < count
        peak = tl.maximum(peak, tl.load(scores + row + first + lane, mask=inside, other=float("-inf")))
    highest = tl.max(peak)
    total = tl.zeros((BLOCK,), tl.float32)
    # The row is in a cache after the first time.
    for first in range(0, count, BLOCK):
        inside = first + lane < count
        value = tl.load(scores + row + first + lane, mask=inside, other=float("-inf"))
        total += tl.exp((value - highest) * scale)
    share = 1.0 / tl.sum(total)
    for first in range(0, count, BLOCK):
        inside = first + lane < count
        value = tl.load(scores + row + first + lane, mask=inside, other=float("-inf"))
        tl.store(out + row + first + lane, tl.exp((value - highest) * scale) * share, mask=inside)


def rms_norm_silu(x: torch.Tensor, bias: torch.Tensor | None, gamma: torch.Tensor, out: torch.Tensor) -> None:
    """See `vae_kernels.rms_norm_silu`; lines of `out` may lie apart, in each the pixels lie one after the other."""
    x = _in_rows(x)
    _, count, frames, height, width = x.shape
    tile, strides = _tile(count), (out.stride(0), out.stride(2), out.stride(3))
    rows = frames * height * width
    kernel: Any = _rms_norm_silu[triton.cdiv(rows, tile["ROWS"]), len(x)]
    kernel(x, bias, gamma, out, rows, height, width, *strides, count, **tile)


def group_norm_silu(
    x: torch.Tensor, bias: torch.Tensor | None, norm: nn.GroupNorm, out: torch.Tensor, gather: Gather | None = None
) -> None:
    """See `vae_kernels.group_norm_silu`; lines of `out` may lie apart, in each the pixels lie one after the other."""
    x = _in_rows(x)
    own = _moments_of(x, bias, norm.num_groups)
    moments, shares = gather(own) if gather else (own[None], (1.0,))
    rows, count, tile = x[0, 0].numel(), x.shape[1], _tile(x.shape[1])
    kernel: Any = _group_norm_silu[triton.cdiv(rows, tile["ROWS"] * NORM_TILES), len(x)]
    inputs = (x, bias, moments, shares, norm.weight, norm.bias, out)
    sizes = (rows, x.shape[3], out.stride(0), out.stride(2))
    kernel(*inputs, *sizes, norm.eps, count, norm.num_groups, NORM_TILES, **tile)


def _moments_of(x: torch.Tensor, bias: torch.Tensor | None, groups: int) -> torch.Tensor:
    """Means and variances of groups of channels, [2, B, G]."""
    batch, count = x.shape[:2]
    rows = x[0, 0].numel()
    tiles = triton.cdiv(rows, MOMENT_ROWS * MAX_BLOCKS)
    blocks = triton.cdiv(rows, MOMENT_ROWS * tiles)
    side = min(MOMENT_CHANNELS, triton.next_power_of_2(count))
    moments = torch.empty(2, batch, blocks, count, dtype=torch.float32, device=x.device)
    kernel: Any = _moments[blocks, triton.cdiv(count, side), batch]
    kernel(x, *moments, rows, tiles, count, MOMENT_ROWS, side)
    of_groups = torch.empty(2, batch, groups, dtype=torch.float32, device=x.device)
    width = count // groups
    side = triton.next_power_of_2(width)
    kernel = _group_moments[groups, batch]
    sizes = (count, width, max(TILE // side // 2, 1), side)
    kernel(*moments, bias, *of_groups, blocks, rows, MOMENT_ROWS * tiles, *sizes)
    return of_groups


def add(shortcut: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """See `vae_kernels.add`."""
    shortcut, x = _in_rows(shortcut), _in_rows(x)
    out = torch.empty_like(x)
    rows, tile = x.numel() // x.shape[1], _tile(x.shape[1])
    kernel: Any = _add[(triton.cdiv(rows, tile["ROWS"]),)]
    kernel(shortcut, x, bias, out, rows, x.shape[1], **tile)
    return out


def double(x: torch.Tensor, out: torch.Tensor) -> None:
    """See `vae_kernels.double`; lines of `out` may lie apart, in each the pixels lie one after the other."""
    x = _in_rows(x)
    batch, count, height, width = x.shape
    rows, tile = batch * height * width, _tile(count)
    kernel: Any = _double[(triton.cdiv(rows, tile["ROWS"]),)]
    kernel(x, out, rows, height, width, out.stride(0), out.stride(2), count, **tile)


def side_by_side(clip: torch.Tensor, count: int) -> torch.Tensor:
    """See `vae_kernels.side_by_side`."""
    clip = _in_rows(clip)
    batch, channels, _, height, width = clip.shape
    frames, tile = clip.shape[2] - count + 1, _tile(channels)
    shape = (batch * frames, count * channels, height, width)
    out = torch.empty(shape, dtype=clip.dtype, device=clip.device, memory_format=torch.channels_last)
    rows = clip[0, 0].numel()
    kernel: Any = _side_by_side[triton.cdiv(rows, tile["ROWS"]), batch]
    kernel(clip, out, rows, height * width, frames, channels, count, **tile)
    return out


def softmax(scores: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """See `vae_kernels.softmax`; `scale` is positive."""
    out = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    kernel: Any = _softmax[(len(scores),)]
    kernel(scores, out, scores.shape[1], scale, TILE)
    return out


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d if x.ndim == 5 else torch.channels_last)


def _tile(channels: int) -> dict[str, int]:
    side = triton.next_power_of_2(channels)
    return {"ROWS": max(TILE // side, 1), "CHANNELS": side}
