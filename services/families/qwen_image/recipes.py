"""How each variant shows its prompt and pictures to the encoders: templates and sizes, as the models were trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.weights import ModelSource

_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_USER = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
MEGAPIXEL = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a variant's text, VAE and DiT parts must agree on.

    Attributes:
        template: of the prompt, with {} where pictures and prompt go.
        template_tokens: tokens before {}; their hidden states are dropped.
        picture: stands before the prompt for each picture, with {} for its number from 1; holds one image mark.
        vision_area_px: area that pictures are scaled to for the vision-language encoder; 0 when there are none.
        latent_area_px: the same for the VAE.
        layers: the variant takes a picture apart: it makes pictures with transparency, as many as there are frames,
            behind one more, the whole.
        still_pictures: input pictures stand at timestep 0, where those of other variants have that of the result.
    """

    template: str
    template_tokens: int
    picture: str = ""
    vision_area_px: int = 0
    latent_area_px: int = 0
    layers: bool = False
    still_pictures: bool = False

    @property
    def takes_pictures(self) -> bool:
        """Whether the variant works on input pictures."""
        return bool(self.latent_area_px)


_TEXT = Recipe(
    template="<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:" + _USER,
    template_tokens=34,
)
_EDIT = Recipe(
    template="<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, "
    "objects, background), then explain how the user's text instruction should alter or modify the image. "
    "Generate a new image that meets the user's requirements while maintaining consistency with the original "
    "input where appropriate." + _USER,
    template_tokens=64,
    picture=_PICTURE,
    vision_area_px=MEGAPIXEL,
    latent_area_px=MEGAPIXEL,
)
_EDIT_PLUS = replace(_EDIT, picture="Picture {}: " + _PICTURE, vision_area_px=384 * 384)
RECIPES = {
    "t2i": _TEXT,
    "layered": replace(_TEXT, latent_area_px=640 * 640, layers=True),
    "edit": _EDIT,
    "edit_plus": _EDIT_PLUS,
    "edit_2511": replace(_EDIT_PLUS, still_pictures=True),
}


def recipe_of(source: ModelSource) -> Recipe:
    """The variant's recipe; a model folder may set other areas (`vision_area_px`, `latent_area_px`)."""
    recipe, settings = RECIPES[source.variant], source.settings()
    return replace(
        recipe,
        vision_area_px=settings.get("vision_area_px", recipe.vision_area_px),
        latent_area_px=settings.get("latent_area_px", recipe.latent_area_px),
    )
