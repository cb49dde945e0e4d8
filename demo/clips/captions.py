"""Plain-English captions for scenes in motion, what of them is held out from training, and captions back to scenes.

Called by training, the evaluation, `make demo` and the tests of clips. As in demo.captions a stable hash holds out
some *sentence forms* (opener, verb, background clause) and some *combinations* (colour, shape, path). Training sees
neither; the evaluation asks for both at once.
"""

import re
from dataclasses import dataclass
from random import Random

from demo.captions import SHAPE_WORDS, TRAINING_SHAPES, held_out_combination, held_out_form
from demo.clips.scenes import HEADINGS, PATHS, SIDE_PX, MovingScene, Path, sample_moving_scene
from demo.scenes import PALETTE

SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "big")}
SPEED_WORDS = {"slow": ("slowly",), "fast": ("quickly", "fast")}
HEADING_WORDS = {
    "right": ("right", "to the right", "to the right"),
    "left": ("left", "to the left", "to the left"),
    "up": ("up", "upwards", "upwards"),
    "down": ("down", "downwards", "downwards"),
    "upper right": ("up and to the right", "diagonally up to the right", "to the upper right"),
    "upper left": ("up and to the left", "diagonally up to the left", "to the upper left"),
    "lower right": ("down and to the right", "diagonally down to the right", "to the lower right"),
    "lower left": ("down and to the left", "diagonally down to the left", "to the lower left"),
}
TURN_WORDS = ("then turns {}", "and then turns {}", "and turns {}")

OPENERS = {
    "none": "{a} {verb}",
    "here": "here {a} {verb}",
    "in_clip": "in this clip {a} {verb}",
    "in_video": "in the video, {a} {verb}",
    "clip": "a clip of {a} that {verb}",
    "video": "a video showing {a} which {verb}",
    "see": "we see {a} that {verb}",
}
VERBS = {"moves": "moves", "glides": "glides", "slides": "slides", "goes": "goes", "travels": "travels"}
BACKGROUNDS = {
    "on": "{body} on {a} background",
    "against": "{body} against {a} background",
    "backdrop": "{body} in front of {a} backdrop",
    "tag": "{body}, {colour} background",
    "sentence": "{body}. The background is {colour}",
    "and": "{body}, and the background is {colour}",
    "on_first": "on {a} background, {body}",
    "tag_first": "{colour} background: {body}",
}


@dataclass(frozen=True, slots=True)
class MovingCaption:
    """A caption, its sentence form, and whether it names the speed."""

    text: str
    form: str
    names_speed: bool


def combination(scene: MovingScene) -> str:
    """What is held out or not."""
    return f"{scene.colour} {scene.shape} {scene.path.name}"


def training_pair(rng: Random, num_captions: int = 1) -> tuple[MovingScene, list[MovingCaption]]:
    """A training scene with several captions. Shapes of fine parts, which are hard to draw, come more often."""
    while True:
        scene = sample_moving_scene(rng, (*TRAINING_SHAPES, "star", "diamond"))
        if not held_out_combination(combination(scene)):
            return scene, [_caption_of_kind(rng, scene, held_out=False) for _ in range(num_captions)]


def held_out_pair(rng: Random) -> tuple[MovingScene, MovingCaption]:
    """A scene and a caption of which neither the combination nor the form was trained on."""
    while True:
        scene = sample_moving_scene(rng)
        if held_out_combination(combination(scene)):
            return scene, _caption_of_kind(rng, scene, held_out=True)


def caption(rng: Random, scene: MovingScene) -> MovingCaption:
    """Describes a scene in one of many ways."""
    opener, verb, background = (rng.choice(list(part)) for part in (OPENERS, VERBS, BACKGROUNDS))
    names_speed = rng.random() < 0.7
    body = OPENERS[opener].format(a=_object(rng, scene), verb=_motion(rng, scene, VERBS[verb], names_speed))
    text = BACKGROUNDS[background].format(body=body, a=_with_article(scene.background), colour=scene.background)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    if ". " in text or rng.random() < 0.4:
        text += "."
    return MovingCaption(text, f"{opener}/{verb}/{background}", names_speed)


def _caption_of_kind(rng: Random, scene: MovingScene, held_out: bool) -> MovingCaption:
    while True:
        candidate = caption(rng, scene)
        if held_out_form(candidate.form) is held_out:
            return candidate


def _object(rng: Random, scene: MovingScene) -> str:
    size = f"{rng.choice(SIZE_WORDS[scene.size])} " if rng.random() < 0.6 else ""
    return _with_article(f"{size}{scene.colour} {rng.choice(SHAPE_WORDS[scene.shape])}")


def _motion(rng: Random, scene: MovingScene, verb: str, names_speed: bool) -> str:
    speed = f"{rng.choice(SPEED_WORDS[scene.speed])}" if names_speed else ""
    before = rng.random() < 0.5
    words = [verb, speed if before else "", rng.choice(HEADING_WORDS[scene.path.first]), "" if before else speed]
    if scene.path.first != scene.path.second:
        words.append(rng.choice(TURN_WORDS).format(rng.choice(HEADING_WORDS[scene.path.second])))
    return " ".join(word for word in words if word)


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _alternatives(words: object) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))  # type: ignore[call-overload]


_SHAPES = {word: shape for shape, words in SHAPE_WORDS.items() for word in words}
_HEADINGS = {word: heading for heading in HEADINGS for word in HEADING_WORDS[heading]}
_SPEEDS = {word: speed for speed, words in SPEED_WORDS.items() for word in words}
_OBJECT = re.compile(rf"\b({_alternatives(PALETTE)}) ({_alternatives(_SHAPES)})\b")
_BACKGROUND = re.compile(
    rf"\b({_alternatives(PALETTE)}) (?:background|backdrop)|background is ({_alternatives(PALETTE)})"
)
_HEADING = re.compile(rf"\b({_alternatives(_HEADINGS)})\b")
_SPEED = re.compile(rf"\b({_alternatives(_SPEEDS)})\b")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a caption asks for, as the scorer takes it; the size and place of `scene` mean nothing."""

    scene: MovingScene
    names_speed: bool


def parse(text: str) -> Asked | None:
    """What a caption says, or None when it is outside the world of these scenes."""
    lowered = text.lower()
    found, background = _OBJECT.search(lowered), _BACKGROUND.search(lowered)
    headings = [_HEADINGS[match[1]] for match in _HEADING.finditer(lowered)]
    if not found or not background or not headings:
        return None
    path = Path(headings[0], headings[-1])
    if len(headings) > 2 or path not in PATHS:
        return None
    speed, colour = _SPEED.search(lowered), background[1] or background[2]
    named = _SPEEDS[speed[1]] if speed else "slow"
    middle = SIDE_PX / 2
    scene = MovingScene(_SHAPES[found[2]], found[1], colour, "large", path, named, middle, middle)
    return Asked(scene, speed is not None)
