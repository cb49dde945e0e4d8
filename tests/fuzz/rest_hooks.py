"""Hooks of schemathesis: most calls get what random ones never hit, so that they come further than the first check.

The OpenAPI page does not say what depends on the model (sizes, steps, which inputs it takes), and nearly every random
body is refused for it: three of four are put right, and the rest of each stays as it was generated. Likewise, ids of
requests and names of models that exist take the place of invented ones.
"""

from __future__ import annotations

import zlib
from collections import deque
from typing import Any

import schemathesis
from schemathesis.generation import GenerationMode

MODEL = "sleeping"
SIZES = (64, 128, 256)
MAX_STEPS = 200
MAX_PROMPT_CHARS = 1000
MAX_GUIDANCE = 30.0
# Inputs, which such a model does not take, and second names, which must not say something else than the first.
LEFT_OUT = ("model", "input_image", "image", "inputs", "num_inference_steps", "guidance_scale", "true_cfg_scale")

# Of the newest requests that the API accepted.
IDS: deque[str] = deque(maxlen=50)


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Called with every answer."""
    if response.status_code == 202:
        IDS.append(response.json()["id"])


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Called with every call that is about to be made. One that is wrong on purpose stays wrong."""
    if case.meta is None or case.meta.generation.mode is not GenerationMode.POSITIVE:
        return
    dice = zlib.crc32(repr((case.path_parameters, case.body)).encode("utf-8", "surrogatepass"))
    # An empty prompt alone is generated again and again.
    if (
        isinstance(case.body, dict)
        and isinstance(case.body.get("prompt"), str)
        and (dice % 4 or not case.body["prompt"])
    ):
        case.body = acceptable(case.body, dice >> 2)
    known = {"name": MODEL, **({"request_id": IDS[dice % len(IDS)]} if IDS else {})}
    if case.path_parameters and dice % 4:
        case.path_parameters = {name: known.get(name, value) for name, value in case.path_parameters.items()}


def acceptable(body: dict[str, Any], dice: int) -> dict[str, Any]:
    """The body with what a text-to-image model would refuse replaced or left out."""
    made = {key: value for key, value in body.items() if key not in LEFT_OUT}
    # JSON Schema takes 5.0 for an integer, the API does not.
    made = {
        key: int(value) if isinstance(value, float) and value.is_integer() else value for key, value in made.items()
    }
    made["prompt"] = made["prompt"][:MAX_PROMPT_CHARS].replace("\0", "").strip() or "a red circle"
    for key in ("width", "height"):
        if key in made:
            made[key] = SIZES[dice % len(SIZES)]
    if "size" in made:
        made["size"] = ("auto", "64x128", "256x256")[dice % 3]
    for key, most in (("steps", MAX_STEPS), ("guidance", MAX_GUIDANCE), ("guidance_2", 1.0), ("num_frames", 1)):
        if isinstance(made.get(key), (int, float)):
            made[key] = min(made[key], most)
    if made.get("stream"):
        made |= {"n": 1, "response_format": "b64_json"}
    else:
        made.pop("partial_images", None)
    if made.get("output_format") not in ("jpeg", "webp"):
        made.pop("output_compression", None)
        made.pop("quality", None)
    if made.get("output_format") in ("gif", "mp4", "wav", "flac", "raw"):
        made["output_format"] = "png"
    return made
