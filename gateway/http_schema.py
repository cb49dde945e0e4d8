"""The bodies that REST clients send, and their way to `GenerationParams`.

Used by the REST routes. Types are strict: a string is not a number, a bool is not an integer, NaN is refused
and so is every field that is not listed. Whether a value fits the model is decided against its limits later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from gateway.http_inputs import is_remote, media_of_url
from protos import gateway_pb2
from services.errors import InvalidRequest
from services.request import FPS, MAX_SEED, GenerationParams, Media, check_total

UINT32_MAX = 2**32 - 1
MAX_IMAGES = 10
GUIDANCE_2 = (
    "Scale of the low-noise expert (default: guidance, if given), or of true guidance beside a distilled one "
    "(default: 1, off)."
)

# Written down here for readers of the schema only: the model's own limits are narrower, and a refusal names those.
Count = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 1, "maximum": UINT32_MAX})]
Scale = Annotated[float, WithJsonSchema({"type": "number", "minimum": 0})]
FramesPerSecond = Annotated[float, WithJsonSchema({"type": "number", "minimum": FPS[0], "maximum": FPS[1]})]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Interpolation = Annotated[
    bool, Field(description="More frames between those that the model makes (docs/interpolation.md).")
]
InterpolationExp = Annotated[
    Count | None,
    Field(description="F frames become (F - 1) * 2^exp + 1, and fps is multiplied by 2^exp; default: 1."),
]
InterpolationScale = Annotated[
    Scale | None,
    Field(
        description="Of the resolution at which motion is estimated: 0.25 to 4, below 1 for large pictures; default: 1."
    ),
]


class StrictBody(BaseModel):
    """A JSON object that takes its own fields only, each of exactly its type."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, value in body.items():
            # JSON can escape half of a surrogate pair, which is no text and has no bytes to be stored as.
            if any(isinstance(text, str) and not _has_bytes(text) for text in (name, value)):
                message = f"{ascii(name)[:100]} holds half of a surrogate pair: send whole Unicode characters"
                raise PydanticCustomError(
                    "no_text", "{message}", {"message": message, "param": ascii(name)[1:-1][:100]}
                )
        unknown = sorted(set(body) - set(cls.model_fields))
        if unknown:
            allowed = ", ".join(sorted(cls.model_fields))
            message = f"unknown field {unknown[0][:100]!r}: allowed are {allowed}"
            raise PydanticCustomError("unknown_field", "{message}", {"message": message, "param": unknown[0][:100]})
        return body


class ImageRequest(StrictBody):
    """Body of `POST /v1/images/generations`: OpenAI's fields, and ours where diffusion models have more.

    The fields of the form of `POST /v1/images/edits` are the same.
    """

    model: str | None = Field(None, description="Name of a served model; may be left out when there is only one.")
    prompt: str
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = Field(
        None, description="Number of images; image i has seed `seed + i`."
    )
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto.")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of jpeg and webp, 0 to 100."
    )
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="Previews to send while streaming, at most."
    )
    quality: Literal["auto", "standard", "low", "medium", "high", "xhigh", "max", "hd"] | None = Field(
        None, description="Changes nothing: steps decide about quality."
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="Changes nothing.")
    input_fidelity: Literal["low", "high"] | None = Field(None, description="Changes nothing.")
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = Field(None, description="Ignored: nothing is moderated.")
    user: str | None = Field(None, description="Ignored.")
    safety_identifier: str | None = Field(None, description="Ignored.")
    negative_prompt: str | None = None
    seed: Seed | None = None
    steps: Count | None = None
    num_inference_steps: Count | None = Field(None, description="Same as steps.")
    guidance: Scale | None = Field(None, description="Classifier-free guidance scale; 1 turns guidance off.")
    guidance_scale: Scale | None = Field(None, description="Same as guidance.")
    true_cfg_scale: Scale | None = Field(None, description="Same as guidance.")
    guidance_2: Scale | None = Field(None, description=GUIDANCE_2)
    input_image: str | list[str] | None = Field(
        None, description="Pictures to edit: data URLs (data:image/png;base64,...), or https URLs of listed hosts."
    )
    image: str | list[str] | None = Field(None, description="Same as input_image.")
    mask: str | None = Field(
        None, description="A picture of the (first) picture's size, as input_image: where it is transparent is edited."
    )

    def file_format(self) -> str:
        """The output format that the request gets."""
        return self.output_format or "png"

    def check(self) -> None:
        """Raises InvalidRequest for fields that are right alone and wrong together."""
        if self.partial_images and not self.stream:
            raise InvalidRequest("partial_images needs stream: true", param="partial_images")
        if self.stream and (self.n or 1) > 1:
            raise InvalidRequest(f"n is {self.n}: a streamed call makes one image", param="n")
        if self.stream and self.response_format == "url":
            raise InvalidRequest(
                "response_format is 'url': a streamed call sends the image itself, use b64_json",
                param="response_format",
            )
        if self.output_compression is not None and self.file_format() == "png":
            raise InvalidRequest("output_compression needs output_format jpeg or webp", param="output_compression")
        if self.seed is not None and self.seed + (self.n or 1) - 1 > MAX_SEED:
            raise InvalidRequest(f"seed + n - 1 must be at most {MAX_SEED}", param="seed")

    def remote(self) -> list[tuple[str, str]]:
        """(parameter, URL) of the pictures that are to be fetched."""
        urls = [(f"input_image.{i}", url) for i, url in enumerate(self._urls())]
        urls += [("mask", self.mask)] if self.mask else []
        return [(param, url) for param, url in urls if is_remote(url)]

    def _urls(self) -> list[str]:
        pictures = one_of(input_image=self.input_image, image=self.image)
        return [pictures] if isinstance(pictures, str) else pictures or []

    def params(
        self, model: gateway_pb2.ModelInfo, inputs: tuple[Media, ...] = (), fetched: Mapping[str, Media] | None = None
    ) -> GenerationParams:
        """The generation of the first image.

        Args:
            model: that makes it.
            inputs: pictures that came beside the body, as multipart files.
            fetched: pictures by URL, those of `remote`.

        Raises:
            InvalidRequest: a model of clips, a size that cannot be read, two names of one field with different values,
                a bad data URL.
        """
        if model.limits.output == "video":
            raise InvalidRequest(f"model {model.name!r} makes video: call /v1/videos", param="model")
        self.check()
        width, height = parse_size(self.size)
        inputs += tuple(media_of_url(url, f"input_image.{i}", fetched=fetched) for i, url in enumerate(self._urls()))
        if self.mask is not None:
            inputs += (media_of_url(self.mask, "mask", "mask", fetched),)
        check_total(inputs, "input_image")
        return GenerationParams(
            model=model.name,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            steps=one_of(steps=self.steps, num_inference_steps=self.num_inference_steps),
            guidance=one_of(
                guidance=self.guidance, guidance_scale=self.guidance_scale, true_cfg_scale=self.true_cfg_scale
            ),
            guidance_2=self.guidance_2,
            seed=self.seed,
            output_format=self.file_format(),
            # OpenAI counts from 0, our encoders from 1.
            quality=None if self.output_compression is None else max(self.output_compression, 1),
            inputs=inputs,
        )


class InputMedia(StrictBody):
    """A condition of a generation."""

    data_url: str = Field(description="data:MIME;base64,..., or an https URL of a listed host")
    role: Literal["image", "last_image", "mask", "video", "audio"] = "image"


class GenerationRequest(StrictBody):
    """Body of `POST /v1/requests`: any generation; a field left out takes the model's default."""

    model: str | None = Field(None, description="Name of a served model; may be left out when there is only one.")
    prompt: str
    negative_prompt: str | None = None
    width: Count | None = None
    height: Count | None = None
    num_frames: Count | None = None
    fps: FramesPerSecond | None = None
    steps: Count | None = None
    guidance: Scale | None = None
    guidance_2: Scale | None = Field(None, description=GUIDANCE_2)
    seed: Seed | None = None
    output_format: Literal["png", "jpeg", "webp", "mp4", "wav", "flac", "raw", "zip", "gif"] | None = None
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    preview_every: Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0, "maximum": UINT32_MAX})] = Field(
        0, description="A preview after every so many steps; 0: none."
    )
    inputs: list[InputMedia] = Field(default_factory=list)
    enable_frame_interpolation: Interpolation = False
    frame_interpolation_exp: InterpolationExp = None
    frame_interpolation_scale: InterpolationScale = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = Field(
        0, description="Below 0 is high, 0 normal, above 0 low; a higher class runs first."
    )

    def remote(self) -> list[tuple[str, str]]:
        """(parameter, URL) of the inputs that are to be fetched."""
        urls = [(f"inputs.{i}.data_url", item.data_url) for i, item in enumerate(self.inputs)]
        return [(param, url) for param, url in urls if is_remote(url)]

    def params(self, model: str, fetched: Mapping[str, Media] | None = None) -> GenerationParams:
        """The generation; `model` and `fetched` as in `ImageRequest.params`.

        Raises:
            InvalidRequest: a bad data URL.
        """
        plain = self.model_dump(exclude={"model", "inputs", "priority"})
        inputs = tuple(
            media_of_url(item.data_url, f"inputs.{i}.data_url", role=item.role, fetched=fetched)
            for i, item in enumerate(self.inputs)
        )
        check_total(inputs, "inputs")
        return GenerationParams(model=model, inputs=inputs, **plain)


def _has_bytes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """Width and height in pixels of "WIDTHxHEIGHT"; None for the model's own ("auto").

    Raises:
        InvalidRequest: anything else.
    """
    if size is None or size == "auto":
        return None, None
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", size)
    if not match:
        raise InvalidRequest(
            f"size is {size[:40]!r}: write WIDTHxHEIGHT in pixels, for example 1024x1024, or auto", param="size"
        )
    return int(match[1]), int(match[2])


def one_of(**values: Any) -> Any:
    """The value of fields that mean the same; None when all are None.

    Raises:
        InvalidRequest: two of them differ.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        return None
    first, *others = given.items()
    for name, value in others:
        if value != first[1]:
            raise InvalidRequest(f"{name} and {first[0]} mean the same and differ: send one of them", param=name)
    return first[1]
