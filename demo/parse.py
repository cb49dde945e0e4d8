"""A plain caption back to the scene it describes, so that any picture of it can be judged.

It reads what people type at the demo, in the pattern "a large red circle to the left of a small blue star on a yellow
background": objects in order, one relation between neighbours, and a background.
"""

from __future__ import annotations

import re

from demo.captions import RELATION_WORDS, SHAPE_WORDS
from demo.scenes import PALETTE, Relation, Scene, SceneObject

_SHAPES = {word: shape for shape, words in SHAPE_WORDS.items() for word in words}
_RELATIONS = {word: kind for kind, words in RELATION_WORDS.items() for word in words}


def _any(words: object) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))  # type: ignore[call-overload]


_OBJECT = re.compile(rf"({_any(PALETTE)}) ({_any(_SHAPES)})\b")
_BACKGROUND = re.compile(rf"({_any(PALETTE)}) (?:background|backdrop)")
_RELATION = re.compile(rf"\b({_any(_RELATIONS)})\b")


def parse(text: str) -> Scene | None:
    """The scene, or None when the text names no object of the demo's world or no background.

    Sizes and places are not read: the scorer judges shapes, colours, relations and background.
    """
    lowered = text.lower()
    found = list(_OBJECT.finditer(lowered))
    background = _BACKGROUND.search(lowered)
    if not found or not background:
        return None
    objects = tuple(SceneObject(_SHAPES[match[2]], match[1], "medium", 0.0, 0.0) for match in found)
    relations = []
    for index, (first, second) in enumerate(zip(found, found[1:], strict=False)):
        between = _RELATION.search(lowered, first.end(), second.start())
        if between:
            relations.append(Relation(index, _RELATIONS[between[1]], index + 1))
    return Scene(objects, background[1], tuple(relations))
