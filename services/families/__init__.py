"""The registry of model families: a name, and the module that holds its `FAMILY`. Imports nothing heavy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from services.errors import StartupError

if TYPE_CHECKING:
    from services.family import Family

FAMILIES = {
    "qwen_image": "services.families.qwen_image",
}

# The pipeline class in a folder's model_index.json -> (family, variant).
PIPELINES = {
    "QwenImagePipeline": ("qwen_image", "t2i"),
}


def load_family(name: str) -> Family:
    """The family of that name.

    Raises:
        StartupError: names the families there are.
    """
    if name not in FAMILIES:
        raise StartupError(f"unknown model family {name!r}: there are {', '.join(sorted(FAMILIES))}")
    family: Family = importlib.import_module(FAMILIES[name]).FAMILY
    return family


def family_of_pipeline(pipeline: str) -> tuple[str, str]:
    """The (family, variant) that serves folders of that pipeline class.

    Raises:
        StartupError: names the pipelines that are served.
    """
    if pipeline not in PIPELINES:
        raise StartupError(f"no family serves models of {pipeline!r}: served are {', '.join(sorted(PIPELINES))}")
    return PIPELINES[pipeline]
