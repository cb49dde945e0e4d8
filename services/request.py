"""What a user asks for, and what a model allows: plain data without torch or gRPC.

The gateway resolves a request against a model's limits before it is stored; rank processes check what follows from
their weights once more before they allocate anything. `services/wire.py` converts to and from the protos.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, TypeVar

from services.errors import InvalidRequest

_T = TypeVar("_T")

MAX_SEED = 2**63 - 1
# All inputs of a request travel to a stage in one gRPC message, which may have 8 MiB.
MAX_INPUT_BYTES = 7 * 1024 * 1024
# Sides of a result that follows its input picture, as the stock pipelines for edits round them.
PICTURE_MULTIPLE_PX = 32
IMAGE_FORMATS = ("png", "jpeg", "webp")
VIDEO_FORMATS = ("mp4", "webp", "gif", "zip", "raw")
LAYER_FORMATS = ("zip", "raw")
AUDIO_FORMATS = ("wav", "flac", "raw")
FPS = (1.0, 120.0)
# A GIF counts in hundredths of a second, WebP in thousandths. What is to stand for 10 ms browsers show for 100.
SHOWN_FPS = {"gif": (1.0, 50.0), "webp": (1.0, 90.0)}
MIN_CLIP_SIDE_PX = 16
# What a gateway takes of a stage as one result, whatever it sends: many times what the largest clip needs as MP4.
MAX_MEDIA_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Media:
    """An encoded picture or clip as it came from outside; `role` says what it is for."""

    mime: str
    data: bytes = field(repr=False)
    role: str = "image"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """One generation. None means: the model's default (see `resolve`)."""

    model: str
    prompt: str = field(repr=False)
    negative_prompt: str | None = field(default=None, repr=False)
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_2: float | None = None
    seed: int | None = None
    output_format: str | None = None
    quality: int | None = None
    preview_every: int = 0
    inputs: tuple[Media, ...] = ()
    enable_frame_interpolation: bool = False
    frame_interpolation_exp: int | None = None
    frame_interpolation_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a model accepts and takes by default. Sizes in pixels, frames counted, fps in frames a second.

    A model whose `output` is "layers" makes `num_frames` pictures with transparency.

    `default_guidance_2` is for the second (low-noise) expert of models with two; 0: the same as `default_guidance`.
    With `separate_guidance_2` it is a scale of another kind (true guidance beside a distilled one), which a request
    that sets `guidance` alone leaves at its default.

    `min_inputs` and `max_inputs` count inputs of the role "image". Beside them, a request brings one input of each of
    `needed_roles`, and may bring one of each of `optional_roles`. With `pictures_need_mask`, a picture comes with a
    mask of what is made anew in it, or not at all. With `needs_any_input`, there is at least one that is no mask.
    """

    output: str = "image"
    size_multiple_px: int = 16
    min_side_px: int = 64
    max_side_px: int = 4096
    max_pixels: int = 2048 * 2048
    max_frames: int = 1
    frame_multiple: int = 1
    min_steps: int = 1
    max_steps: int = 200
    max_guidance: float = 30.0
    max_prompt_chars: int = 8000
    min_inputs: int = 0
    max_inputs: int = 0
    needed_roles: tuple[str, ...] = ()
    optional_roles: tuple[str, ...] = ()
    pictures_need_mask: bool = False
    needs_any_input: bool = False
    default_width: int = 1024
    default_height: int = 1024
    default_frames: int = 1
    default_fps: float = 0.0
    default_steps: int = 50
    default_guidance: float = 4.0
    default_guidance_2: float = 0.0
    separate_guidance_2: bool = False
    default_negative_prompt: str = " "

    @property
    def other_roles(self) -> tuple[str, ...]:
        """What an input may be for, other than "image"."""
        return (*self.needed_roles, *self.optional_roles)

    @property
    def most_inputs(self) -> int:
        """How many a request may bring, of all roles together."""
        return self.max_inputs + len(self.other_roles)

    def without_inputs(self) -> Limits:
        """The same of a request that brings none: where they come as latents."""
        return replace(self, min_inputs=0, needed_roles=(), needs_any_input=False)

    def of_any_model(self) -> Limits:
        """The same without a model's own bounds, which a stage does not know: several models may share its weights."""
        return replace(
            self.without_inputs(),
            optional_roles=self.other_roles,
            pictures_need_mask=False,
            min_side_px=self.size_multiple_px,
            max_side_px=16384,
            max_pixels=64 * 1024 * 1024,
            max_frames=4096 if self.max_frames > 1 else 1,
            min_steps=1,
            max_steps=1000,
            max_guidance=1000.0,
            max_prompt_chars=1024 * 1024,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InterpolationLimits:
    """What interpolation accepts: `max_pixels` of a frame, `max_frames` of a result."""

    max_exp: int = 4
    min_scale: float = 0.25
    max_scale: float = 4.0
    max_pixels: int = 4096 * 2304
    max_frames: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedParams:
    """A generation with every field set and checked: what stages and engines work with."""

    model: str
    prompt: str = field(repr=False)
    negative_prompt: str = field(repr=False)
    width: int
    height: int
    num_frames: int
    fps: float
    steps: int
    guidance: float
    guidance_2: float
    seed: int
    output_format: str
    quality: int
    preview_every: int
    inputs: tuple[Media, ...] = ()
    enable_frame_interpolation: bool = False
    frame_interpolation_exp: int = 1
    frame_interpolation_scale: float = 1.0


def resolve(
    params: GenerationParams, limits: Limits, *, seed: int, picture: tuple[int, int] | None = None
) -> ResolvedParams:
    """Fills in the model's defaults and checks every value.

    Args:
        params: the request as it came.
        limits: of the model it names.
        seed: taken when the request brings none (the caller draws it, so that the request is repeatable).
        picture: (width, height) of the first input picture, whose shape a result without a size gets.

    Raises:
        InvalidRequest: names the parameter, its value and what is allowed.
    """
    _check_interpolation_is_on(params)
    guidance = _or(params.guidance, limits.default_guidance)
    # Who sets one scale means both experts; the model's own pair comes as a pair.
    own_second = limits.separate_guidance_2 or (params.guidance is None and limits.default_guidance_2 > 0)
    second = limits.default_guidance_2 if own_second else guidance
    width, height = _default_size(limits, picture)
    resolved = ResolvedParams(
        model=params.model,
        prompt=params.prompt,
        negative_prompt=_or(params.negative_prompt, limits.default_negative_prompt),
        width=_or(params.width, width),
        height=_or(params.height, height),
        num_frames=_or(params.num_frames, limits.default_frames),
        fps=_or(params.fps, limits.default_fps),
        steps=_or(params.steps, limits.default_steps),
        guidance=guidance,
        guidance_2=_or(params.guidance_2, second),
        seed=_or(params.seed, seed),
        output_format=_or(params.output_format, _formats(limits)[0]),
        quality=_or(params.quality, 90),
        preview_every=params.preview_every,
        inputs=params.inputs,
        enable_frame_interpolation=params.enable_frame_interpolation,
        frame_interpolation_exp=_or(params.frame_interpolation_exp, 1),
        frame_interpolation_scale=_or(params.frame_interpolation_scale, 1.0),
    )
    check(resolved, limits)
    return resolved


def _check_interpolation_is_on(params: GenerationParams) -> None:
    for name in ("frame_interpolation_exp", "frame_interpolation_scale"):
        value = getattr(params, name)
        if value is not None and not params.enable_frame_interpolation:
            raise InvalidRequest(
                f"{name} is {value}, and enable_frame_interpolation is false: set that to true, or leave {name} out",
                param=name,
            )


def _default_size(limits: Limits, picture: tuple[int, int] | None) -> tuple[int, int]:
    """The model's size, or one of the same area in the picture's shape."""
    width, height = limits.default_width, limits.default_height
    if picture is None or "video" in limits.other_roles:
        return width, height
    unit = math.lcm(limits.size_multiple_px, PICTURE_MULTIPLE_PX)
    lowest, highest = -(-limits.min_side_px // unit) * unit, limits.max_side_px // unit * unit
    aspect = picture[0] / picture[1]
    exact_width = math.sqrt(width * height * aspect)

    def rounded(to_whole: Callable[[float], int]) -> tuple[int, int]:
        sides = [
            min(max(to_whole(side / unit) * unit, lowest), highest) for side in (exact_width, exact_width / aspect)
        ]
        return sides[0], sides[1]

    width, height = rounded(round)
    return (width, height) if width * height <= limits.max_pixels else rounded(math.floor)


def open_params(**values: Any) -> GenerationParams:
    """A request from fields by name, as callers of the Python API give them.

    Raises:
        InvalidRequest: there is no such field.
    """
    known = {spec.name for spec in fields(GenerationParams)}
    for name in values:
        if name not in known:
            raise InvalidRequest(f"unknown option {name!r}: there are {', '.join(sorted(known))}", param=name)
    return GenerationParams(**values)


def with_seed(params: GenerationParams, seed: int) -> GenerationParams:
    """The same request with another seed."""
    return replace(params, seed=seed)


def check(params: ResolvedParams, limits: Limits) -> None:
    """Raises InvalidRequest for the first value outside the limits."""
    _check_text(params, limits)
    _check_size(params, limits)
    _check_frames(params, limits)
    _between("steps", params.steps, limits.min_steps, limits.max_steps)
    _between("guidance", params.guidance, 0.0, limits.max_guidance)
    _between("guidance_2", params.guidance_2, 0.0, limits.max_guidance)
    _between("seed", params.seed, 0, MAX_SEED)
    _between("quality", params.quality, 1, 100)
    _between("preview_every", params.preview_every, 0, limits.max_steps)
    _check_inputs(params, limits)
    formats = _formats(limits)
    if params.output_format not in formats:
        raise InvalidRequest(
            f"output_format {params.output_format!r} does not fit a model that makes {limits.output}: use one of "
            f"{', '.join(formats)}",
            param="output_format",
        )
    if limits.output == "video":
        _check_shown_fps(params)


def check_interpolation(params: ResolvedParams, allowed: InterpolationLimits) -> None:
    """Raises InvalidRequest when a clip cannot be interpolated as its parameters ask for."""
    if params.output_format not in VIDEO_FORMATS:
        raise InvalidRequest(
            f"output_format {params.output_format!r} is none for a clip: use one of {', '.join(VIDEO_FORMATS)}",
            param="output_format",
        )
    for name, side in (("width", params.width), ("height", params.height)):
        if side % 2 or side < MIN_CLIP_SIDE_PX:
            raise InvalidRequest(f"{name} is {side}: it must be even, and at least {MIN_CLIP_SIDE_PX}", param=name)
    pixels = params.width * params.height
    if pixels > allowed.max_pixels:
        most = f"at most {allowed.max_pixels} can be interpolated"
        raise InvalidRequest(f"size {params.width}x{params.height} has {pixels} pixels: {most}", param="width")
    _between("fps", params.fps, *FPS)
    _between("quality", params.quality, 1, 100)
    _between("frame_interpolation_exp", params.frame_interpolation_exp, 1, allowed.max_exp)
    _between("frame_interpolation_scale", params.frame_interpolation_scale, allowed.min_scale, allowed.max_scale)
    _check_shown_fps(params, 2**params.frame_interpolation_exp)
    frames, max_frames = interpolated_frames(params), allowed.max_frames
    if params.output_format != "mp4":
        # The files of the others may be as large as their pixels, and WebP and raw pixels are held whole.
        max_frames = min(max_frames, MAX_MEDIA_BYTES // (3 * pixels))
    if frames > max_frames:
        raise InvalidRequest(
            f"frame_interpolation_exp {params.frame_interpolation_exp} makes {frames} frames of {params.num_frames}: "
            f"at most {max_frames} of this size and format are allowed",
            param="frame_interpolation_exp",
        )


def _check_shown_fps(params: ResolvedParams, times: int = 1) -> None:
    """Of a clip that interpolation makes so many times as fast."""
    if shown := SHOWN_FPS.get(params.output_format):
        how = f", {times} times {params.fps}," if times > 1 else ""
        _between(f"fps of a {params.output_format}{how}", params.fps * times, *shown, param="fps")


class Interpolated(Protocol):
    """What says how many frames there will be, in whatever form the parameters are."""

    @property
    def num_frames(self) -> int: ...

    @property
    def frame_interpolation_exp(self) -> int: ...


def interpolated_frames(params: Interpolated) -> int:
    """How many frames interpolation makes of a clip."""
    return int((params.num_frames - 1) * 2**params.frame_interpolation_exp + 1)


def check_total(inputs: Sequence[Media], param: str) -> None:
    """Raises InvalidRequest when the inputs of a request are too large together."""
    total = sum(len(item.data) for item in inputs)
    if total > MAX_INPUT_BYTES:
        raise InvalidRequest(f"{param}: {total} bytes in all, at most {MAX_INPUT_BYTES} are allowed", param=param)


def _check_text(params: ResolvedParams, limits: Limits) -> None:
    if not params.prompt.strip():
        raise InvalidRequest("prompt is empty: it needs at least one character that is not a space", param="prompt")
    for name, text in (("prompt", params.prompt), ("negative_prompt", params.negative_prompt)):
        if len(text) > limits.max_prompt_chars:
            raise InvalidRequest(
                f"{name} has {len(text)} characters: at most {limits.max_prompt_chars} are allowed", param=name
            )
        if "\x00" in text:
            raise InvalidRequest(f"{name} contains a NUL character: remove it", param=name)


def _check_size(params: ResolvedParams, limits: Limits) -> None:
    for name, side in (("width", params.width), ("height", params.height)):
        _between(name, side, limits.min_side_px, limits.max_side_px)
        if side % limits.size_multiple_px:
            low = side // limits.size_multiple_px * limits.size_multiple_px
            raise InvalidRequest(
                f"{name} {side} is not a multiple of {limits.size_multiple_px}: use {max(low, limits.min_side_px)} or "
                f"{low + limits.size_multiple_px}",
                param=name,
            )
    if params.width * params.height > limits.max_pixels:
        raise InvalidRequest(
            f"size {params.width}x{params.height} has {params.width * params.height} pixels: at most "
            f"{limits.max_pixels} are allowed",
            param="width",
        )


def _check_frames(params: ResolvedParams, limits: Limits) -> None:
    _between("num_frames", params.num_frames, 1, limits.max_frames)
    if (params.num_frames - 1) % limits.frame_multiple:
        low = (params.num_frames - 1) // limits.frame_multiple * limits.frame_multiple + 1
        raise InvalidRequest(
            f"num_frames {params.num_frames} is not {limits.frame_multiple} * k + 1: use {low} or "
            f"{low + limits.frame_multiple}",
            param="num_frames",
        )
    if limits.output == "video":
        _between("fps", params.fps, *FPS)
    elif params.enable_frame_interpolation:
        raise InvalidRequest(
            f"model {params.model!r} makes {limits.output}: enable_frame_interpolation needs one that makes video",
            param="enable_frame_interpolation",
        )
    elif params.fps:
        raise InvalidRequest(f"model {params.model!r} makes {limits.output}: fps is for clips", param="fps")


def _check_inputs(params: ResolvedParams, limits: Limits) -> None:
    if params.inputs and not limits.most_inputs:
        raise InvalidRequest(f"model {params.model!r} takes no input pictures", param="inputs")
    if not params.inputs and limits.min_inputs:
        raise InvalidRequest(f"model {params.model!r} needs an input picture, and there is none", param="inputs")
    roles = [item.role for item in params.inputs]
    for role in roles:
        if role not in ("image", *limits.other_roles):
            allowed = ", ".join(("image", *limits.other_roles))
            raise InvalidRequest(
                f"an input has the role {role!r}: model {params.model!r} takes {allowed}", param="inputs"
            )
    _between(
        "inputs (count)" if not limits.other_roles else "inputs of the role image (count)",
        roles.count("image"),
        limits.min_inputs,
        limits.max_inputs,
        param="inputs",
    )
    for role in limits.other_roles:
        _between(
            f"inputs of the role {role} (count)", roles.count(role), int(role in limits.needed_roles), 1, param="inputs"
        )
    if limits.pictures_need_mask and ("image" in roles) != ("mask" in roles):
        raise InvalidRequest(
            f"model {params.model!r} takes a picture and a mask of what is made anew in it, or neither: there is only "
            f"the {'picture' if 'image' in roles else 'mask'}",
            param="inputs",
        )
    if "video" in limits.other_roles and "mask" in roles and "video" not in roles:
        raise InvalidRequest("there is a mask and no clip: send one with the role video", param="inputs")
    if limits.needs_any_input and not set(roles) - {"mask"}:
        allowed = " or ".join(role for role in ("image", *limits.other_roles) if role != "mask")
        raise InvalidRequest(
            f"model {params.model!r} needs an input of the role {allowed}, and there is none", param="inputs"
        )
    check_total(params.inputs, "inputs")


def _between(name: str, value: float, low: float, high: float, *, param: str = "") -> None:
    # `not (a <= x <= b)` also catches NaN.
    if not low <= value <= high or not math.isfinite(value):
        allowed = f"between {low} and {high}" if low < high else f"{low}"
        raise InvalidRequest(f"{name} is {value}: it must be {allowed}", param=param or name)


def _formats(limits: Limits) -> tuple[str, ...]:
    formats = {"image": IMAGE_FORMATS, "layers": LAYER_FORMATS, "video": VIDEO_FORMATS, "audio": AUDIO_FORMATS}
    return formats[limits.output]


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value
