"""The registry of model families: a name, and the module that holds its `FAMILY`. Imports nothing heavy."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from services.errors import StartupError

if TYPE_CHECKING:
    from services.family import Family

FAMILIES = {
    "flux": "services.families.flux",
    "hidream": "services.families.hidream",
    "qwen_image": "services.families.qwen_image",
    "wan": "services.families.wan",
}

# The pipeline class in a folder's model_index.json -> (family, variant). Where one class serves several variants, the
# setting that tells them apart stands behind it, of model_index.json or of the transformer's config, or the class of a
# component.
PIPELINES = {
    "FluxPipeline": ("flux", "schnell"),
    "FluxPipeline guidance_embeds": ("flux", "dev"),
    "HiDreamImagePipeline": ("hidream", "full"),
    "HiDreamImagePipeline fast": ("hidream", "fast"),
    "HiDreamImagePipeline FlowMatchLCMScheduler": ("hidream", "dev"),
    "QwenImagePipeline": ("qwen_image", "t2i"),
    "QwenImageEditPipeline": ("qwen_image", "edit"),
    "QwenImageEditPlusPipeline": ("qwen_image", "edit_plus"),
    "QwenImageEditPlusPipeline zero_cond_t": ("qwen_image", "edit_2511"),
    "QwenImageLayeredPipeline": ("qwen_image", "layered"),
    "WanPipeline": ("wan", "t2v_one_expert"),
    "WanPipeline boundary_ratio": ("wan", "t2v"),
    "WanPipeline expand_timesteps": ("wan", "ti2v"),
    "WanVACEPipeline": ("wan", "vace"),
    "WanImageToVideoPipeline": ("wan", "i2v_one_expert"),
    "WanImageToVideoPipeline boundary_ratio": ("wan", "i2v"),
    "WanImageToVideoPipeline expand_timesteps": ("wan", "ti2v"),
    "WanImageToVideoPipeline pos_embed_seq_len": ("wan", "flf2v"),
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


def family_of_pipeline(pipeline: str, settings: Mapping[str, Any]) -> tuple[str, str]:
    """The (family, variant) that serves folders of that pipeline class with these settings.

    Raises:
        StartupError: names the pipelines that are served.
    """
    for name, value in settings.items():
        # Components stand in model_index.json as [library, class].
        for key in (name, value[-1] if value and isinstance(value, list) else ""):
            if value and f"{pipeline} {key}" in PIPELINES:
                return PIPELINES[f"{pipeline} {key}"]
    if pipeline not in PIPELINES:
        raise StartupError(f"no family serves models of {pipeline!r}: served are {', '.join(sorted(PIPELINES))}")
    return PIPELINES[pipeline]
