"""Reads a clip and tells whether it shows a scene in motion: colour, shape, background, path, speed, smoothness.

Called by the evaluation, by `make demo` and by the tests of clips. Every frame is read as demo.scorer reads a picture;
the centres of the object's pixels give its track. It knows no model and no caption.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demo.clips.scenes import HEADINGS, SPEEDS_PX, TURN_FRAMES, MovingScene
from demo.scenes import PALETTE
from demo.scorer import largest_component, nearest_colours, nearest_shape

MIN_AREA_PX = 150
"""A component smaller than this is an edge or noise; the smallest object covers about 850 pixels."""
FRAMES_RIGHT = 0.8
"""A clip's colour, shape or background is right when it is right in this share of its frames."""
SMOOTH_PX2 = 0.25
"""A motion is smooth up to this variance of the distance covered a frame."""

_COLOURS = tuple(PALETTE)


@dataclass(frozen=True, slots=True)
class ClipScore:
    """Shares of the frames (0..1) and verdicts of the clip.

    `variance_px2` is that of the distance covered from frame to frame, infinite where the object is not in every frame.
    """

    colour_frames: float
    shape_frames: float
    background_frames: float
    path_right: bool
    speed_right: bool
    variance_px2: float

    @property
    def object_right(self) -> bool:
        return min(self.colour_frames, self.shape_frames) >= FRAMES_RIGHT

    @property
    def smooth(self) -> bool:
        return self.variance_px2 <= SMOOTH_PX2

    @property
    def agrees(self) -> bool:
        """Whether clip and scene agree in everything but smoothness, which no caption states."""
        return self.object_right and self.background_frames >= FRAMES_RIGHT and self.path_right and self.speed_right


@dataclass(frozen=True, slots=True)
class ClipTotals:
    """Shares (0..1) over many clips, and the median variance of those that have one."""

    clips: int
    colours: float
    shapes: float
    objects: float
    backgrounds: float
    paths: float
    speeds: float
    agree: float
    smooth: float
    median_variance_px2: float


def score(clip: NDArray[np.uint8], scene: MovingScene, names_speed: bool = True) -> ClipScore:
    """Compares a clip with the scene it should show.

    Shapes: `clip` is (33 or more, height, width, 3), values 0..255; frames beyond 33 belong to a clip that was
    interpolated, so time is measured in shares of the clip.

    Args:
        names_speed: False: any speed is right.

    Raises: ValueError when it is no such clip.
    """
    if clip.ndim != 4 or clip.shape[3] != 3 or clip.dtype != np.uint8 or len(clip) < 3:
        raise ValueError(f"want uint8 (frames, height, width, 3), got {clip.dtype} {clip.shape}")
    labels = nearest_colours(clip)
    background = [int(np.bincount(frame.ravel()).argmax()) == _COLOURS.index(scene.background) for frame in labels]
    found = [_find(frame == _COLOURS.index(scene.colour)) for frame in labels]
    shapes = [shape for shape, _ in found]
    centres = np.array([centre for _, centre in found])
    lengths = np.hypot(*np.diff(centres, axis=0).T)
    seen = ~np.isnan(centres[:, 0])
    return ClipScore(
        colour_frames=float(seen.mean()),
        shape_frames=sum(shape == scene.shape for shape in shapes) / len(shapes),
        background_frames=sum(background) / len(background),
        path_right=_path(centres) == (scene.path.first, scene.path.second),
        speed_right=not names_speed or _speed(centres) == scene.speed,
        variance_px2=float(lengths.var()) if seen.all() else math.inf,
    )


def total(scores: Iterable[ClipScore]) -> ClipTotals:
    """Shares of what is right over many clips."""
    listed = list(scores)

    def share(verdicts: Iterable[float]) -> float:
        return sum(verdicts) / max(1, len(listed))

    variances = [s.variance_px2 for s in listed if math.isfinite(s.variance_px2)]
    return ClipTotals(
        clips=len(listed),
        colours=share(s.colour_frames for s in listed),
        shapes=share(s.shape_frames for s in listed),
        objects=share(s.object_right for s in listed),
        backgrounds=share(s.background_frames for s in listed),
        paths=share(s.path_right for s in listed),
        speeds=share(s.speed_right for s in listed),
        agree=share(s.agrees for s in listed),
        smooth=share(s.smooth for s in listed),
        median_variance_px2=float(np.median(variances)) if variances else math.inf,
    )


def _find(mask: NDArray[np.bool_]) -> tuple[str | None, tuple[float, float]]:
    """The shape and centre of the largest component; no shape and no numbers when it is too small."""
    if int(mask.sum()) < MIN_AREA_PX:
        return None, (math.nan, math.nan)
    top, left, cut = _box(mask)
    component = largest_component(cut)
    if int(component.sum()) < MIN_AREA_PX:
        return None, (math.nan, math.nan)
    rows, columns = np.nonzero(component)
    return nearest_shape(_box(component)[2]), (left + float(columns.mean()), top + float(rows.mean()))


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, NDArray[np.bool_]]:
    """Top, left, and what of the mask is in the smallest box around it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    return top, left, mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1]


def _path(centres: NDArray[np.float64]) -> tuple[str | None, str | None]:
    """The nearest headings of what comes before the turn's frames and after them; None where nothing moves."""
    per_frame = (len(centres) - 1) / 32
    begin, end = (round(frame * per_frame) for frame in TURN_FRAMES)
    return _heading(centres[: begin + 1], per_frame), _heading(centres[end:], per_frame)


def _heading(centres: NDArray[np.float64], per_frame: float) -> str | None:
    seen = centres[~np.isnan(centres[:, 0])]
    if len(seen) < len(centres) / 2 or len(seen) < 2:
        return None
    dx, dy = seen[-1] - seen[0]
    if math.hypot(dx, dy) < 0.25 * (len(seen) - 1) / per_frame:
        return None
    return HEADINGS[round(math.atan2(dy, dx) / (math.pi / 4)) % 8]


def _speed(centres: NDArray[np.float64]) -> str | None:
    """The nearer speed, by ratio, of the way from every fourth centre to the next: noise would lengthen every step."""
    seen = centres[~np.isnan(centres[:, 0])]
    if len(seen) < len(centres) / 2 or len(seen) < 5:
        return None
    marks = seen[:: max(1, (len(seen) - 1) // 8)]
    pixels = float(np.hypot(*np.diff(marks, axis=0).T).sum()) / 32
    return min(SPEEDS_PX, key=lambda name: abs(math.log(max(pixels, 1e-6) / SPEEDS_PX[name])))
