"""Clips for training: layers that move independently, one before another, drawn at any time with their true flow.

A layer is an outline filled with a piece of a photograph or with a plain colour. It moves on a line, turns, grows and
bends; a camera's pan moves all layers alike. Some pieces are enlarged until they have no detail. Everything is drawn
in batches where its tensors are, by sampling; nothing is loaded.

Letters of shapes: N clips, M their layers (`LAYERS` of each clip, back to front; the first fills the picture), S the
picture's side in pixels. Coordinates are pixels (x, y) from the picture's centre; times go from 0 (the first picture)
to 1 (the second).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from demo.interpolation.outlines import BARS, BLOBS, REACH, outline_atlas
from demo.interpolation.photographs import TILE_PX
from demo.scenes import PALETTE, SHAPES

LAYERS = 5
PLAIN_SHARE = 0.2
MAX_BEND_PX = 4.0
BEND_KNOTS = 5
BEND_REACH_PX = 160.0
FAR_PX = 1e4
"""Added to the distance from an outline, it puts the outline out of sight: all is outside, or (negative) inside."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """What clips are drawn from, from time 0 to 1.

    A layer travels `travel` at most, times a number in [0, 1) to the power of `rareness`; with the camera's pan, which
    all layers share, `pan` more (both against the picture's side). It turns by `turn` (radians) and grows by `growth`
    (logarithm) at most. Its photograph has at least `contrast`, and is smooth with probability `blurred`.
    """

    travel: float
    rareness: float
    pan: float
    turn: float
    growth: float
    contrast: float
    blurred: float


NEAR = Ranges(24 / 256, 1.6, pan=0.0, turn=math.radians(8), growth=0.08, contrast=0.6, blurred=0.0)
"""24 px of 256 at most, all in focus: what networks are compared by."""
FAR = Ranges(0.25, 3.0, pan=0.2, turn=math.radians(12), growth=0.12, contrast=0.25, blurred=0.4)
"""What training draws. Between every second frame of a film, things near the camera move as far; a network that was
taught `NEAR` alone shows them double."""


@dataclass(frozen=True, slots=True)
class Motion:
    """From time 0 to 1: travel [M, 2] px, turn (radians) and growth (logarithm) [M], bend [M, 2, K, K] px.

    `centre` [M, 2] and `angle` [M] are those of time 1/2.
    """

    centre: torch.Tensor
    travel: torch.Tensor
    angle: torch.Tensor
    turn: torch.Tensor
    growth: torch.Tensor
    bend: torch.Tensor

    def to_layer(self, points: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Where points [M, S, S, 2] of the picture lie in their layers at times [M]."""
        late = time - 0.5
        moved = points - _spread(self.centre + self.travel * late[:, None])
        straight = _rotate(moved, -self.angle - self.turn * late) * _spread((-self.growth * late).exp())
        return straight + _spread(late) * self._bend_at(straight)

    def to_picture(self, points: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The way back; off by a tenth of a pixel at most where a layer bends."""
        late = time - 0.5
        straight = points - _spread(late) * self._bend_at(points - _spread(late) * self._bend_at(points))
        turned = _rotate(straight, self.angle + self.turn * late) * _spread((self.growth * late).exp())
        return turned + _spread(self.centre + self.travel * late[:, None])

    def _bend_at(self, points: torch.Tensor) -> torch.Tensor:
        return _sample(self.bend, points / BEND_REACH_PX, "border").permute(0, 2, 3, 1)


@dataclass(frozen=True, slots=True)
class Look:
    """What a layer is cut from, and how.

    Its outline: index, radius, softness of the edge (px), and what is added to the distance from it (px), each [M]. Its
    filling: index and zoom of a tile [M], place in it [M, 2] px, colour = matrix [M, 3, 3] @ tile + shift [M, 3].
    """

    outline: torch.Tensor
    radius: torch.Tensor
    softness: torch.Tensor
    offset: torch.Tensor
    tile: torch.Tensor
    zoom: torch.Tensor
    place: torch.Tensor
    matrix: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True, slots=True)
class Clips:
    """N clips of a side; their layers stand one after another."""

    motion: Motion
    look: Look
    side_px: int

    def __len__(self) -> int:
        return len(self.look.tile) // LAYERS

    def to(self, device: torch.device) -> Clips:
        """The same clips there."""
        motion = {part.name: getattr(self.motion, part.name).to(device) for part in fields(Motion)}
        look = {part.name: getattr(self.look, part.name).to(device) for part in fields(Look)}
        return Clips(Motion(**motion), Look(**look), self.side_px)


class Painter:
    """Draws clips with the photographs it holds: tiles [T, 3, 384, 384] in [0, 1]."""

    def __init__(self, tiles: torch.Tensor) -> None:
        self.tiles = tiles
        self._outlines = outline_atlas().to(tiles)

    def draw(self, clips: Clips, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pictures of times [N], and their true flow to times 0 (x, y) and 1, also where that end is hidden.

        Returns:
            [N, 3, S, S] in [0, 1], and [N, 4, S, S] px.
        """
        time = time.repeat_interleave(LAYERS)
        points = _pixels(clips.side_px, time.device).expand(len(time), -1, -1, -1)
        local = clips.motion.to_layer(points, time)
        ends = [clips.motion.to_picture(local, torch.full_like(time, end)) - points for end in (0.0, 1.0)]
        coverage, flow = self._coverage(clips.look, local), torch.cat(ends, -1).permute(0, 3, 1, 2)
        return _lay_colours(self._colour(clips.look, local), coverage), _lay_flows(flow, coverage)

    def picture(self, clips: Clips, time: torch.Tensor) -> torch.Tensor:
        """What `draw` returns first, for less than half of the work."""
        time = time.repeat_interleave(LAYERS)
        local = clips.motion.to_layer(_pixels(clips.side_px, time.device).expand(len(time), -1, -1, -1), time)
        return _lay_colours(self._colour(clips.look, local), self._coverage(clips.look, local))

    def _coverage(self, look: Look, local: torch.Tensor) -> torch.Tensor:
        """[M, 1, S, S]: 1 inside, 0 outside, between at the edge."""
        unit = _sample(self._outlines[look.outline], local / _spread(look.radius * REACH), "border")
        distance = unit * _spread(look.radius) + _spread(look.offset)
        return (0.5 - distance / _spread(look.softness)).clamp(0, 1)

    def _colour(self, look: Look, local: torch.Tensor) -> torch.Tensor:
        """[M, 3, S, S] in [0, 1]."""
        place = (local * _spread(look.zoom) + _spread(look.place)) / (TILE_PX / 2)
        sampled = _sample(self.tiles[look.tile], place, "reflection").flatten(2)
        return (torch.baddbmm(look.shift[:, :, None], look.matrix, sampled)).clamp(0, 1).view(-1, 3, *local.shape[1:3])


class Draw:
    """Random numbers, one for each of M layers, on the generator's device."""

    def __init__(self, clips: int, generator: torch.Generator) -> None:
        self.depth = torch.arange(LAYERS, device=generator.device).repeat(clips)
        self._clips = clips
        self._generator = generator

    def uniform(self, low: float = 0.0, high: float = 1.0, *shape: int) -> torch.Tensor:
        """[M, *shape] between two numbers."""
        return low + (high - low) * self._rand(len(self.depth), *shape)

    def normal(self, *shape: int) -> torch.Tensor:
        """[M, *shape] of deviation 1."""
        generator = self._generator
        return torch.randn(len(self.depth), *shape, generator=generator, device=generator.device)

    def index(self, count: int) -> torch.Tensor:
        """[M] below `count`."""
        return (self._rand(len(self.depth)) * count).long()

    def alike(self) -> torch.Tensor:
        """[M] in [0, 1), the same for all layers of a clip."""
        return self._rand(self._clips).repeat_interleave(LAYERS)

    def _rand(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self._generator, device=self._generator.device)


def sample_clips(
    count: int,
    side_px: int,
    tiles: int,
    generator: torch.Generator,
    *,
    plain_share: float = PLAIN_SHARE,
    ranges: Ranges = FAR,
) -> Clips:
    """Clips at random, on the generator's device.

    Args:
        tiles: how many there are to cut from.
        plain_share: of the clips, those that are scenes of the demo: flat shapes before a flat ground.
    """
    draw = Draw(count, generator)
    plain = draw.alike() < plain_share
    return Clips(_sample_motion(draw, ranges, side_px), _sample_look(draw, ranges, plain, side_px, tiles), side_px)


def _sample_look(draw: Draw, ranges: Ranges, plain: torch.Tensor, side_px: int, tiles: int) -> Look:
    device = draw.depth.device
    # A clip has none to four layers before its ground.
    shown = draw.alike() * LAYERS > draw.depth
    flat = plain | ((draw.uniform() < 0.1) & (draw.depth > 0))
    palette = torch.tensor(list(PALETTE.values()), device=device) / 255
    colour = torch.where(draw.uniform(0, 1, 1) < 0.5, palette[draw.index(len(PALETTE))], draw.uniform(0, 1, 3))
    # Some layers have little contrast, some are smooth: enlarged up to four times. Of these, half have a soft edge
    # too, as what is out of focus; the others are things without detail.
    contrast = draw.uniform(ranges.contrast, 1.2, 1, 1)
    tint = contrast * (torch.eye(3, device=device) + 0.12 * draw.normal(3, 3))
    blur = torch.where(draw.uniform() < ranges.blurred, draw.uniform(), 0.0)
    soft = draw.uniform() < 0.5
    return Look(
        outline=torch.where(plain, draw.index(len(SHAPES)), draw.index(len(SHAPES) + BLOBS + BARS)),
        radius=draw.uniform(0.08 * side_px, 0.36 * side_px),
        softness=torch.where(plain, 1.0, draw.uniform(0.8, 2.5) * 4 ** (blur * soft)),
        offset=torch.where(draw.depth == 0, -FAR_PX, torch.where(shown, 0.0, FAR_PX)),
        tile=draw.index(tiles),
        zoom=draw.uniform(0.5, 1.25) * 4**-blur,
        place=draw.uniform(-TILE_PX / 2, TILE_PX / 2, 2),
        matrix=torch.where(flat[:, None, None], 0.0, tint),
        shift=torch.where(flat[:, None], colour, draw.uniform(-0.15, 0.3, 3)),
    )


def _sample_motion(draw: Draw, ranges: Ranges, side_px: int) -> Motion:
    # Small motions are the most frequent ones in clips; one layer in ten stands still, and half of all cameras do.
    length = ranges.travel * side_px * draw.uniform().pow(ranges.rareness) * (draw.uniform() > 0.1)
    pan = ranges.pan * side_px * draw.alike().pow(2) * (draw.alike() > 0.5)
    bends = MAX_BEND_PX * draw.uniform().pow(2) * (draw.uniform() < 0.5)
    return Motion(
        centre=draw.uniform(-0.45 * side_px, 0.45 * side_px, 2) * (draw.depth > 0)[:, None],
        travel=_headed(length, draw.uniform()) + _headed(pan, draw.alike()),
        angle=draw.uniform(-math.pi, math.pi),
        turn=ranges.turn * draw.uniform(-1, 1).pow(3),
        growth=ranges.growth * draw.uniform(-1, 1).pow(3),
        bend=bends[:, None, None, None] * draw.normal(2, BEND_KNOTS, BEND_KNOTS),
    )


def _headed(length: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Steps [M, 2] of lengths, in directions given as shares of a full turn."""
    heading = 2 * math.pi * turns
    return length[:, None] * torch.stack([heading.cos(), heading.sin()], -1)


def _lay_colours(colour: torch.Tensor, coverage: torch.Tensor) -> torch.Tensor:
    """Lays layers [M, 3, S, S] one upon another: pictures."""
    colours, covers = (x.unflatten(0, (-1, LAYERS)).unbind(1) for x in (colour, coverage))
    picture: torch.Tensor = colours[0]
    for layer, cover in zip(colours[1:], covers[1:], strict=True):
        picture = torch.lerp(picture, layer, cover)
    return picture


def _lay_flows(flow: torch.Tensor, coverage: torch.Tensor) -> torch.Tensor:
    """The flow of the front layer that covers most of a pixel."""
    flows, covers = (x.unflatten(0, (-1, LAYERS)).unbind(1) for x in (flow, coverage))
    moved: torch.Tensor = flows[0]
    for layer, cover in zip(flows[1:], covers[1:], strict=True):
        moved = torch.where(cover > 0.5, layer, moved)
    return moved


def _pixels(side_px: int, device: torch.device) -> torch.Tensor:
    axis = torch.arange(side_px, device=device) - (side_px - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1)


def _sample(planes: torch.Tensor, points: torch.Tensor, beyond: str) -> torch.Tensor:
    """Planes [M, C, H, W] at points [M, S, S, 2], -1 to 1 from edge to edge."""
    return F.grid_sample(planes, points, mode="bilinear", padding_mode=beyond, align_corners=False)


def _rotate(points: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    x, y = points.unbind(-1)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1)


def _spread(values: torch.Tensor) -> torch.Tensor:
    """[M] or [M, 2] as [M, 1, 1, 1 or 2]."""
    return values.view(len(values), 1, 1, -1)
