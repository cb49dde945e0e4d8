"""Plain-English captions for scenes, and what of them is held out from training.

Called by training, the evaluation, the tokenizer builder and the tests. It knows scenes and nothing of
models or pixels.

A caption is an opener, a body and a background clause. The three names together are its *sentence form*.
A stable hash holds out some forms, and some *combinations* (shape, colour, relation, shape, colour; for a
single object shape, colour, background). Training never sees either; the evaluation asks for both at once.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from demo.scenes import SHAPES, Relation, Scene, clear_relations, sample_scene

SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond", "diamond", "rhombus"),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "cross", "plus sign"),
    "ring": ("ring", "ring", "hoop"),
}
SIZE_WORDS = {
    "small": ("small", "small", "tiny", "little"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "big", "huge"),
}
RELATION_WORDS = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "under", "beneath"),
}

PHRASE_OPENERS = {
    "none": "{}",
    "there": "there is {}",
    "picture": "a picture of {}",
    "image": "an image showing {}",
    "drawing": "a drawing with {}",
    "draw": "draw {}",
    "shows": "this picture shows {}",
    "see": "we see {}",
}
SENTENCE_OPENERS = {"none": "{}", "here": "here {}", "in_picture": "in this picture, {}", "in_image": "in the image {}"}
BACKGROUNDS = {
    "on": "{body} on {a} background",
    "backdrop": "{body} on {a} backdrop",
    "against": "{body} against {a} background",
    "in_front": "{body} in front of {a} background",
    "tag": "{body}, {colour} background",
    "sentence": "{body}. The background is {colour}",
    "and": "{body}, and the background is {colour}",
    "with": "{body}, with {a} backdrop",
    "on_first": "on {a} background, {body}",
    "against_first": "against {a} backdrop, {body}",
    "tag_first": "{colour} background: {body}",
}
TRAINING_SIZES = (0.45, 0.3, 0.25)
TRAINING_SHAPES = (*SHAPES, "star", "cross", "ring", "star", "cross")
TRAINING_SLOPE = 2.6
HELD_OUT_FORMS = 6
"""One sentence form in this many is held out."""
HELD_OUT_COMBINATIONS = 10
"""One combination in this many is held out."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption, the name of its sentence form, and whether it names the sizes."""

    text: str
    form: str
    names_sizes: bool


def held_out_form(form: str) -> bool:
    """Whether a sentence form never appears in training."""
    return _one_in(form, HELD_OUT_FORMS)


def held_out_combination(combination: str) -> bool:
    """Whether a combination never appears in training."""
    return _one_in(combination, HELD_OUT_COMBINATIONS)


def relation_combination(scene: Scene, relation: Relation) -> str:
    """The same name whichever of the two objects the relation starts from."""
    if relation.kind in ("right", "below"):
        relation = relation.inverse
    first, second = scene.objects[relation.subject], scene.objects[relation.object]
    return f"{first.colour} {first.shape} {relation.kind} {second.colour} {second.shape}"


def combinations(scene: Scene, relations: tuple[Relation, ...]) -> list[str]:
    """The combinations a scene shows with these relations."""
    if len(scene.objects) == 1:
        item = scene.objects[0]
        return [f"{item.colour} {item.shape} on {scene.background}"]
    return [relation_combination(scene, relation) for relation in relations]


def is_training_scene(scene: Scene) -> bool:
    """True when nothing that is plain to see in it, stated or not, is held out."""
    return not any(map(held_out_combination, combinations(scene, tuple(clear_relations(scene.objects)))))


def is_held_out_scene(scene: Scene) -> bool:
    """True when everything its caption states is held out."""
    return all(map(held_out_combination, combinations(scene, scene.relations)))


def training_pair(rng: Random, num_captions: int = 1) -> tuple[Scene, list[Caption]]:
    """A training scene with several captions.

    What is hard to draw comes more often: small objects, full scenes, shapes of fine parts. Relations are plainer than
    they have to be, because what the model draws scatters around what it saw.
    """
    while True:
        num_objects = rng.choices((1, 2, 3), (0.2, 0.35, 0.45))[0]
        scene = sample_scene(rng, num_objects, TRAINING_SIZES, TRAINING_SHAPES, TRAINING_SLOPE)
        if is_training_scene(scene):
            return scene, [_caption_of_kind(rng, scene, held_out=False) for _ in range(num_captions)]


def held_out_pair(rng: Random, num_objects: int) -> tuple[Scene, Caption]:
    """A scene and a caption of which neither the combinations nor the form were trained on."""
    while True:
        scene = sample_scene(rng, num_objects)
        if is_held_out_scene(scene):
            return scene, _caption_of_kind(rng, scene, held_out=True)


def caption(rng: Random, scene: Scene) -> Caption:
    """Describe a scene in one of many ways."""
    names_sizes = rng.random() < 0.7
    words = _Words(rng, scene, names_sizes)
    bodies = BODIES[len(scene.objects)]
    body_name = rng.choice(list(bodies))
    body = bodies[body_name](words)
    openers = SENTENCE_OPENERS if body_name.startswith("is_") else PHRASE_OPENERS
    opener = rng.choice(list(openers))
    background = rng.choice(list(BACKGROUNDS))
    text = BACKGROUNDS[background].format(
        body=openers[opener].format(body), a=_with_article(scene.background), colour=scene.background
    )
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    if "." in text or rng.random() < 0.4:
        text += "."
    return Caption(text, f"{opener}/{body_name}/{background}", names_sizes)


def _caption_of_kind(rng: Random, scene: Scene, held_out: bool) -> Caption:
    while True:
        candidate = caption(rng, scene)
        if held_out_form(candidate.form) is held_out:
            return candidate


class _Words:
    """Chooses the words for one caption and remembers how each object was named."""

    def __init__(self, rng: Random, scene: Scene, names_sizes: bool) -> None:
        self.rng = rng
        self.scene = scene
        self.names_sizes = names_sizes
        self.nouns = [rng.choice(SHAPE_WORDS[item.shape]) for item in scene.objects]
        self.relations = [r if rng.random() < 0.5 else r.inverse for r in scene.relations]

    def a(self, index: int) -> str:
        """First mention: a small red circle; a red circle of small size; ..."""
        item, noun = self.scene.objects[index], self.nouns[index]
        size = f"{self.rng.choice(SIZE_WORDS[item.size])} " if self.names_sizes else ""
        pattern = self.rng.random()
        if pattern < 0.1:
            phrase = f"{size}{noun} in {item.colour}"
        elif pattern < 0.2:
            phrase = f"{size}{noun} coloured {item.colour}"
        elif pattern < 0.3 and size:
            phrase = f"{item.colour} {noun} of {item.size} size"
        else:
            phrase = f"{size}{item.colour} {noun}"
        return f"one {phrase}" if self.rng.random() < 0.15 else _with_article(phrase)

    def the(self, index: int) -> str:
        """A later mention: the red circle."""
        return f"the {self.scene.objects[index].colour} {self.nouns[index]}"

    def where(self, kind: str) -> str:
        return self.rng.choice(RELATION_WORDS[kind])

    def chain(self) -> tuple[Relation, Relation]:
        """The two relations of three objects, the second one starting at an object of the first."""
        first, second = self.relations
        if second.subject not in (first.subject, first.object):
            second = second.inverse
        return first, second


def _one_phrase(w: _Words) -> str:
    return w.a(0)


def _two_direct(w: _Words) -> str:
    (r,) = w.relations
    return f"{w.a(r.subject)} {w.where(r.kind)} {w.a(r.object)}"


def _two_is(w: _Words) -> str:
    (r,) = w.relations
    return f"{w.a(r.subject)} {w.rng.choice(('is', 'sits', 'lies'))} {w.where(r.kind)} {w.a(r.object)}"


def _two_inverse(w: _Words) -> str:
    (r,) = w.relations
    return f"{w.where(r.kind)} {w.a(r.object)} is {w.a(r.subject)}"


def _two_with(w: _Words) -> str:
    (r,) = w.relations
    return f"{w.a(r.object)} with {w.a(r.subject)} {w.where(r.kind)} it"


def _two_list(w: _Words) -> str:
    (r,) = w.relations
    pair = f"{w.a(r.subject)} and {w.a(r.object)}"
    number = w.rng.choice(("", "two shapes: ", "two objects: "))
    return f"{number}{pair}, {w.the(r.subject)} {w.where(r.kind)} {w.the(r.object)}"


def _three_direct(w: _Words) -> str:
    first, second = w.chain()
    opening = f"{w.a(first.subject)} {w.where(first.kind)} {w.a(first.object)}"
    return f"{opening}, with {w.the(second.subject)} {w.where(second.kind)} {w.a(second.object)}"


def _three_is(w: _Words) -> str:
    first, second = w.chain()
    opening = f"{w.a(first.subject)} {w.rng.choice(('is', 'sits', 'lies'))} {w.where(first.kind)} {w.a(first.object)}"
    back = second.inverse
    return f"{opening}, and {w.a(back.subject)} is {w.where(back.kind)} {w.the(back.object)}"


def _three_inverse(w: _Words) -> str:
    first, second = w.chain()
    opening = f"{w.where(first.kind)} {w.a(first.object)} is {w.a(first.subject)}"
    back = second.inverse
    return f"{opening}, and {w.where(back.kind)} {w.the(back.object)} is {w.a(back.subject)}"


def _three_with(w: _Words) -> str:
    first, second = w.chain()
    opening = f"{w.a(first.object)} with {w.a(first.subject)} {w.where(first.kind)} it"
    back = second.inverse
    return f"{opening} and {w.a(back.subject)} {w.where(back.kind)} {w.the(back.object)}"


def _three_list(w: _Words) -> str:
    first, second = w.chain()
    listed = f"{w.a(first.subject)}, {w.a(first.object)} and {w.a(second.object)}"
    number = w.rng.choice(("", "three shapes: ", "three objects: "))
    clauses = [f"{w.the(r.subject)} {w.where(r.kind)} {w.the(r.object)}" for r in (first, second)]
    return f"{number}{listed}, {clauses[0]} and {clauses[1]}"


BODIES: dict[int, dict[str, Callable[[_Words], str]]] = {
    1: {"phrase": _one_phrase},
    2: {
        "direct": _two_direct,
        "is_direct": _two_is,
        "is_inverse": _two_inverse,
        "with": _two_with,
        "list": _two_list,
    },
    3: {
        "direct": _three_direct,
        "is_direct": _three_is,
        "is_inverse": _three_inverse,
        "with": _three_with,
        "list": _three_list,
    },
}


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _one_in(name: str, count: int) -> bool:
    """A stable coin: the same on every machine and in every version of Python."""
    return zlib.crc32(name.encode()) % count == 0
