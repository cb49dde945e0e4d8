"""Scenes of one to three flat shapes: what the demo model is trained on and judged by.

Called by captions, the scorer, training and the tests. It knows no model and no text.
The signed distances take their array module as an argument, so numpy (one scene) and torch (batches on
a GPU) draw with the same formulas.

Coordinates are pixels, x to the right and y down; a shape is described in its own unit square,
centre (0, 0), reach about 1, and scaled by the object's radius.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE_PX = 256
MARGIN_PX = 6
"""Free pixels between an object's reach and the border, and between two objects."""

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (243, 140, 30),
    "yellow": (250, 222, 60),
    "green": (40, 160, 70),
    "cyan": (70, 205, 220),
    "blue": (40, 75, 200),
    "purple": (125, 45, 155),
    "pink": (247, 135, 185),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
SIZES_PX = {"small": 22.0, "medium": 34.0, "large": 48.0}
"""Radius of each size in pixels."""

PLAIN_SLOPE = 1.7
"""What still counts as plainly left of: up to 30 degrees off the level."""

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One flat shape; `x` and `y` are its centre in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def radius_px(self) -> float:
        return SIZES_PX[self.size]


@dataclass(frozen=True, slots=True)
class Relation:
    """`objects[subject]` lies `kind` (left, right, above, below) of `objects[object]`."""

    subject: int
    kind: str
    object: int

    @property
    def inverse(self) -> "Relation":
        return Relation(self.object, OPPOSITE[self.kind], self.subject)


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects of distinct colours on a plain background, and the relations its caption states."""

    objects: tuple[SceneObject, ...]
    background: str
    relations: tuple[Relation, ...] = ()


def signed_distance(shape: str, x: Any, y: Any, xp: Any) -> Any:
    """Distance to the outline of a unit shape: negative inside, exact sign, first-order exact at the edge.

    Shapes: `x`, `y` and the result are arrays of module `xp` (numpy or torch) that broadcast together.
    """
    ax, ay = xp.abs(x), xp.abs(y)
    if shape == "circle":
        return xp.sqrt(x * x + y * y) - 0.95
    if shape == "ring":
        return xp.abs(xp.sqrt(x * x + y * y) - 0.72) - 0.25
    if shape == "square":
        return xp.maximum(ax, ay) - 0.84
    if shape == "diamond":
        return (ax + ay) * math.sqrt(0.5) - 0.73
    if shape == "triangle":  # Apex (0, -1), base from (-1, 0.8) to (1, 0.8).
        return xp.maximum(y - 0.8, (1.8 * ax - (y + 1.0)) / math.hypot(1.8, 1.0))
    if shape == "cross":
        upright, level = xp.maximum(ax - 0.31, ay - 0.95), xp.maximum(ax - 0.95, ay - 0.31)
        return xp.minimum(upright, level)
    if shape == "heart":  # A square on its corner, with a half disc on each upper side.
        body = (ax + xp.abs(y - 0.1)) * math.sqrt(0.5) - 0.8 * math.sqrt(0.5)
        lobes = xp.sqrt((ax - 0.4) ** 2 + (y + 0.3) ** 2) - 0.8 * math.sqrt(0.5)
        return xp.minimum(body, lobes)
    if shape == "star":
        return _star_distance(x, y, xp)
    raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")


def _star_distance(x: Any, y: Any, xp: Any) -> Any:
    """Five points: fold the plane onto one half point, then measure to its single edge."""
    tip, notch, sector = 1.05, 0.48, 2.0 * math.pi / 5.0
    angle = xp.arctan2(x, -y)
    folded = xp.abs(xp.remainder(angle + sector / 2, sector) - sector / 2)
    reach = xp.sqrt(x * x + y * y)
    px, py = reach * xp.cos(folded), reach * xp.sin(folded)
    ex, ey = notch * math.cos(sector / 2) - tip, notch * math.sin(sector / 2)
    return ((px - tip) * ey - py * ex) / math.hypot(ex, ey)


def draw(scene: Scene, size_px: int = IMAGE_SIZE_PX) -> NDArray[np.uint8]:
    """Draw a scene with anti-aliased edges; shape (size, size, 3), values 0..255."""
    scale = IMAGE_SIZE_PX / size_px
    centres = (np.arange(size_px) + 0.5) * scale
    x, y = centres[None, :], centres[:, None]
    image = np.broadcast_to(np.array(PALETTE[scene.background], np.float64), (size_px, size_px, 3))
    for item in scene.objects:
        radius = item.radius_px
        distance = signed_distance(item.shape, (x - item.x) / radius, (y - item.y) / radius, np)
        coverage = np.clip(0.5 - distance * radius / scale, 0.0, 1.0)[..., None]
        image = image * (1.0 - coverage) + np.array(PALETTE[item.colour], np.float64) * coverage
    return np.rint(image).astype(np.uint8)


def clear_relation(first: SceneObject, second: SceneObject, slope: float = PLAIN_SLOPE) -> str | None:
    """What a person would say of where `first` is seen from `second`; None if it is not plain.

    Args:
        slope: how many times further apart than along the other axis.
    """
    dx, dy = first.x - second.x, first.y - second.y
    reach = first.radius_px + second.radius_px
    if abs(dx) >= max(slope * abs(dy), 0.9 * reach):
        return "left" if dx < 0 else "right"
    if abs(dy) >= max(slope * abs(dx), 0.9 * reach):
        return "above" if dy < 0 else "below"
    return None


def clear_relations(objects: tuple[SceneObject, ...], slope: float = PLAIN_SLOPE) -> list[Relation]:
    """Every pair with a plain relation, earlier object as the subject."""
    found = []
    for i, first in enumerate(objects):
        for j in range(i + 1, len(objects)):
            kind = clear_relation(first, objects[j], slope)
            if kind is not None:
                found.append(Relation(i, kind, j))
    return found


def sample_scene(
    rng: Random,
    num_objects: int,
    size_weights: tuple[float, float, float] = (1, 1, 1),
    shapes: Sequence[str] = SHAPES,
    slope: float = PLAIN_SLOPE,
) -> Scene:
    """Draw a random scene whose stated relations connect all its objects.

    Args:
        size_weights: how often small, medium and large are drawn.
        shapes: what is drawn from; a shape that is listed twice comes twice as often.
        slope: how plain the stated relations are, see clear_relation.
    """
    while True:
        colours = rng.sample(list(PALETTE), num_objects + 1)
        sizes = rng.choices(list(SIZES_PX), size_weights, k=num_objects)
        objects: tuple[SceneObject, ...] = ()
        for colour, size in zip(colours, sizes, strict=False):
            placed = _place(rng, objects, colour, size, shapes)
            if placed is None:
                break
            objects += (placed,)
        if len(objects) < num_objects:
            continue
        relations = clear_relations(objects, slope)
        rng.shuffle(relations)
        needed = num_objects - 1
        # Any two of the three pairs share an object, so `needed` relations always connect the scene.
        if len(relations) >= needed:
            stated = tuple(r if rng.random() < 0.5 else r.inverse for r in relations[:needed])
            return Scene(objects, colours[num_objects], stated)


def _place(
    rng: Random, others: tuple[SceneObject, ...], colour: str, size: str, shapes: Sequence[str]
) -> SceneObject | None:
    """Put one object where it touches neither the border nor another; None after 20 tries."""
    reach = SIZES_PX[size] * 1.05 + MARGIN_PX
    shape = rng.choice(shapes)
    for _ in range(20):
        x, y = rng.uniform(reach, IMAGE_SIZE_PX - reach), rng.uniform(reach, IMAGE_SIZE_PX - reach)
        if all(math.hypot(x - o.x, y - o.y) >= reach + o.radius_px * 1.05 for o in others):
            return SceneObject(shape, colour, size, x, y)
    return None
