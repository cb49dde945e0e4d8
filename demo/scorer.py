"""Reads a picture and tells whether it shows a scene: colours, shapes, background, relations.

Called by the evaluation, by tests of lossy features and by the benchmarks. It looks at pixels only
(segmentation by nearest palette colour) and knows no model and no caption.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from demo.scenes import PALETTE, SHAPES, Relation, Scene, SceneObject, signed_distance

TEMPLATE_PX = 48
MIN_AREA_PX = 150
"""A component smaller than this is an edge or noise; the smallest drawn object covers about 450 pixels."""
MIN_IOU = 0.7
"""Below this the component is no shape at all, whichever template is nearest."""

_COLOURS = tuple(PALETTE)


@dataclass(frozen=True, slots=True)
class ObjectScore:
    """What was found in the colour of one object; `shape` is None when nothing there has a shape."""

    colour_found: bool
    shape: str | None
    shape_right: bool
    centre_px: tuple[float, float] | None
    area_px: int

    @property
    def right(self) -> bool:
        return self.colour_found and self.shape_right


@dataclass(frozen=True, slots=True)
class SceneScore:
    """One verdict for each object, for the background and for each stated relation."""

    objects: tuple[ObjectScore, ...]
    background_right: bool
    relations: tuple[bool, ...]

    @property
    def agrees(self) -> bool:
        """Whether picture and scene agree in everything."""
        return self.background_right and all(o.right for o in self.objects) and all(self.relations)


@dataclass(frozen=True, slots=True)
class Totals:
    """Shares (0..1) over many pictures; a share over nothing is 1."""

    pictures: int
    colours: float
    objects: float
    backgrounds: float
    relations: float
    agree: float


def score(image: NDArray[np.uint8], scene: Scene) -> SceneScore:
    """Compare a picture with the scene it should show.

    Shapes: `image` is (height, width, 3), values 0..255.
    Raises: ValueError when it is not.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"want uint8 (height, width, 3), got {image.dtype} {image.shape}")
    labels = nearest_colours(image)
    objects = tuple(_score_object(labels, item) for item in scene.objects)
    most_common = _COLOURS[int(np.bincount(labels.ravel(), minlength=len(_COLOURS)).argmax())]
    relations = tuple(_relation_holds(objects, relation) for relation in scene.relations)
    return SceneScore(objects, most_common == scene.background, relations)


def total(scores: Iterable[SceneScore]) -> Totals:
    """Shares of what is right over many pictures."""
    listed = list(scores)
    objects = [o for s in listed for o in s.objects]

    def share(verdicts: list[bool]) -> float:
        return sum(verdicts) / len(verdicts) if verdicts else 1.0

    return Totals(
        pictures=len(listed),
        colours=share([o.colour_found for o in objects]),
        objects=share([o.right for o in objects]),
        backgrounds=share([s.background_right for s in listed]),
        relations=share([r for s in listed for r in s.relations]),
        agree=share([s.agrees for s in listed]),
    )


def nearest_colours(image: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Index of the nearest palette colour of every pixel; shape (height, width)."""
    palette = np.array([PALETTE[name] for name in _COLOURS], np.float32)
    # |p - c|^2 without |p|^2, which is equal for every colour.
    affinity = image.astype(np.float32) @ (2.0 * palette.T) - (palette**2).sum(1)
    nearest: NDArray[np.intp] = affinity.argmax(-1)
    return nearest


def _score_object(labels: NDArray[np.intp], item: SceneObject) -> ObjectScore:
    component = largest_component(labels == _COLOURS.index(item.colour))
    area = int(component.sum())
    if area < MIN_AREA_PX:
        return ObjectScore(False, None, False, None, area)
    rows, columns = np.flatnonzero(component.any(1)), np.flatnonzero(component.any(0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
    shape = nearest_shape(component[top : bottom + 1, left : right + 1])
    centre = ((left + right) / 2.0, (top + bottom) / 2.0)
    return ObjectScore(True, shape, shape == item.shape, centre, area)


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The most pixels of the mask that hang together by their sides."""
    spread = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    labels = np.zeros_like(spread)
    while not np.array_equal(labels, spread):
        labels = spread
        spread = _largest_of_runs(_largest_of_runs(labels).T).T
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest: NDArray[np.bool_] = mask & (labels == sizes.argmax())
    return largest


def _largest_of_runs(labels: NDArray[np.intp]) -> NDArray[np.intp]:
    """Every run of labels in a row, each with its largest one; 0 is none and ends a run."""
    rows, columns = labels.shape
    flat = np.pad(labels, ((0, 0), (0, 1))).ravel()
    starts = np.flatnonzero(np.diff(flat > 0, prepend=flat[:1] == 0))
    largest = np.repeat(np.maximum.reduceat(flat, starts), np.diff(starts, append=flat.size))
    return largest.reshape(rows, columns + 1)[:, :-1]


def nearest_shape(box: NDArray[np.bool_]) -> str | None:
    """The shape whose template overlaps most with a component's bounding box, if any does well."""
    height, width = box.shape
    if max(height, width) > 2.0 * min(height, width):
        return None
    rows = ((np.arange(TEMPLATE_PX) + 0.5) * height / TEMPLATE_PX).astype(int)
    columns = ((np.arange(TEMPLATE_PX) + 0.5) * width / TEMPLATE_PX).astype(int)
    resized = box[np.ix_(rows, columns)]
    overlaps = {
        shape: (resized & template).sum() / (resized | template).sum() for shape, template in _templates().items()
    }
    best = max(overlaps, key=lambda shape: float(overlaps[shape]))
    return best if overlaps[best] >= MIN_IOU else None


@cache
def _templates() -> dict[str, NDArray[np.bool_]]:
    """Every shape, drawn large, cut at its bounding box and resized like a component."""
    centres = (np.arange(512) + 0.5) / 512 * 2.4 - 1.2
    templates = {}
    for shape in SHAPES:
        inside = signed_distance(shape, centres[None, :], centres[:, None], np) <= 0
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        y = np.linspace(rows[0], rows[-1], TEMPLATE_PX).round().astype(int)
        x = np.linspace(columns[0], columns[-1], TEMPLATE_PX).round().astype(int)
        templates[shape] = inside[np.ix_(y, x)]
    return templates


def _relation_holds(objects: tuple[ObjectScore, ...], relation: Relation) -> bool:
    """Whether the two found objects lie as stated, along the axis on which they are further apart."""
    subject, other = objects[relation.subject].centre_px, objects[relation.object].centre_px
    if subject is None or other is None:
        return False
    dx, dy = subject[0] - other[0], subject[1] - other[1]
    if relation.kind in ("left", "right"):
        return abs(dx) > abs(dy) and (dx < 0) == (relation.kind == "left")
    return abs(dy) > abs(dx) and (dy < 0) == (relation.kind == "above")
