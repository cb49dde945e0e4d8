"""The body of OpenAI's videos API and its video object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from gateway.http_inputs import is_remote, media_of_url
from gateway.http_json import state_name
from gateway.http_schema import (
    GUIDANCE_2,
    Count,
    FramesPerSecond,
    Interpolation,
    InterpolationExp,
    InterpolationScale,
    Scale,
    Seed,
    StrictBody,
    one_of,
    parse_size,
)
from gateway.http_wait import failure
from protos import gateway_pb2, types_pb2
from services.errors import InvalidRequest
from services.request import GenerationParams, Media, check_total

# How far a clip is when a stage begins, and how far when it ends, in percent: denoising, with encoding before it, is
# nearly all of the time; decoding, with interpolation behind it, counts frames, the last of which
# are then yet to be encoded.
PROGRESS = {
    types_pb2.STAGE_DIT: (2, 90),
    types_pb2.STAGE_VAE: (90, 99),
}
# OpenAI knows fewer states than a request has.
STATES = {"queued": "queued", "running": "in_progress", "cancelling": "in_progress", "done": "completed"}


# OpenAI's other way to name a picture: {"image_url": URL}.
Reference = Annotated[dict[Literal["image_url"], str], Field(min_length=1)]


class VideoRequest(StrictBody):
    """Body of `POST /v1/videos`: OpenAI's fields, and ours where diffusion models have more."""

    model: str | None = Field(None, description="Name of a served model; may be left out when there is only one.")
    prompt: str
    seconds: str | float | None = Field(None, description="Length of the clip; the nearest that the model makes.")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto.")
    input_reference: str | list[str] | Reference | None = Field(
        None, description="Pictures to begin with: data URLs, or https URLs of listed hosts. In a form also files."
    )
    num_frames: Count | None = Field(None, description="Instead of seconds.")
    fps: FramesPerSecond | None = None
    negative_prompt: str | None = None
    seed: Seed | None = None
    steps: Count | None = None
    num_inference_steps: Count | None = Field(None, description="Same as steps.")
    guidance: Scale | None = Field(None, description="Classifier-free guidance scale; 1 turns guidance off.")
    guidance_scale: Scale | None = Field(None, description="Same as guidance.")
    guidance_2: Scale | None = Field(None, description=GUIDANCE_2)
    output_format: Literal["mp4", "webp", "gif", "zip"] | None = None
    enable_frame_interpolation: Interpolation = False
    frame_interpolation_exp: InterpolationExp = None
    frame_interpolation_scale: InterpolationScale = None
    user: str | None = Field(None, description="Ignored.")

    def remote(self) -> list[tuple[str, str]]:
        """(parameter, URL) of the pictures that are to be fetched."""
        return [(f"input_reference.{i}", url) for i, url in enumerate(self._urls()) if is_remote(url)]

    def _urls(self) -> list[str]:
        given = self.input_reference
        urls = given["image_url"] if isinstance(given, dict) else given
        return [urls] if isinstance(urls, str) else urls or []

    def params(
        self, model: gateway_pb2.ModelInfo, inputs: tuple[Media, ...] = (), fetched: Mapping[str, Media] | None = None
    ) -> GenerationParams:
        """The generation.

        Args:
            inputs: pictures that came beside the body, as files of a form.
            fetched: pictures by URL, those of `remote`.

        Raises:
            InvalidRequest: a model of pictures, a size or length that cannot be, a bad data URL.
        """
        limits = model.limits
        if limits.output != "video":
            raise InvalidRequest(f"model {model.name!r} makes no video but {limits.output}", param="model")
        width, height = parse_size(self.size)
        urls = enumerate(self._urls())
        inputs += tuple(media_of_url(url, f"input_reference.{i}", fetched=fetched) for i, url in urls)
        check_total(inputs, "input_reference")
        fps = limits.default_fps if self.fps is None else self.fps
        frames = None if self.seconds is None else frames_of(self.seconds, fps, limits)
        return GenerationParams(
            model=model.name,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            num_frames=one_of(num_frames=self.num_frames, seconds=frames),
            fps=self.fps,
            steps=one_of(steps=self.steps, num_inference_steps=self.num_inference_steps),
            guidance=one_of(guidance=self.guidance, guidance_scale=self.guidance_scale),
            guidance_2=self.guidance_2,
            seed=self.seed,
            output_format=self.output_format or "mp4",
            enable_frame_interpolation=self.enable_frame_interpolation,
            frame_interpolation_exp=self.frame_interpolation_exp,
            frame_interpolation_scale=self.frame_interpolation_scale,
            inputs=inputs,
        )


def frames_of(seconds: str | float, fps: float, limits: types_pb2.Limits) -> int:
    """The number of frames that the model makes whose length is nearest to so many seconds.

    Raises:
        InvalidRequest: no number, not above 0, or longer than the model's longest clip.
    """
    try:
        length = float(seconds)
    except ValueError:
        length = math.nan
    if not 0 < length < math.inf:
        raise InvalidRequest(f"seconds is {str(seconds)[:40]!r}: send a number above 0", param="seconds")
    multiple = limits.frame_multiple
    # No clip is as long, and what rounds to a whole number must be finite. A rate below 0 is refused with its limits.
    exact = min(max(length * fps, 0.0), 2.0 * (limits.max_frames + multiple))
    frames = max(0, round((exact - 1) / multiple)) * multiple + 1
    if frames > limits.max_frames:
        longest = limits.max_frames / fps
        raise InvalidRequest(
            f"seconds is {str(seconds)[:40]}: at {fps:g} frames a second the model makes at most {longest:.2f}",
            param="seconds",
        )
    return frames


def is_video(status: gateway_pb2.RequestStatus) -> bool:
    """Whether a request asks for a clip: of all results, it alone has a rate."""
    return status.params.fps > 0


def video_json(status: gateway_pb2.RequestStatus) -> dict[str, Any]:
    """OpenAI's video object of a request."""
    params, state = status.params, state_name(status.state)
    done = status.state == gateway_pb2.REQUEST_STATE_DONE
    shown = STATES.get(state, "failed")
    if shown == "queued" and status.stage:
        # It waits for its next stage.
        shown = "in_progress"
    failed = failure(status) if shown == "failed" else None
    return {
        "id": status.request_id,
        "object": "video",
        "status": shown,
        "progress": progress_of(status),
        "created_at": int(status.created_unix_s),
        "completed_at": int(status.updated_unix_s) if done else None,
        "expires_at": None,
        "model": params.model,
        "prompt": params.prompt,
        "seconds": f"{seconds_of(params):g}",
        "size": f"{params.width}x{params.height}",
        "remixed_from_video_id": None,
        "error": {"code": failed.reason, "message": failed.message} if failed else None,
    }


def seconds_of(params: types_pb2.GenerationParams) -> float:
    """How long the file of a clip plays."""
    return _frames(params) / (params.fps * _times(params))


def _frames(params: types_pb2.GenerationParams) -> int:
    """How many the file of a clip has."""
    return (params.num_frames - 1) * _times(params) + 1


def _times(params: types_pb2.GenerationParams) -> int:
    return 1 << params.frame_interpolation_exp if params.enable_frame_interpolation else 1


def progress_of(status: gateway_pb2.RequestStatus) -> int:
    """Percent of the way, 0 to 100, from the stage and the steps or frames that have been made."""
    if status.state == gateway_pb2.REQUEST_STATE_DONE:
        return 100
    first, last = PROGRESS.get(status.stage, (0, 0))
    made, of = status.step, status.total_steps
    if status.stage == types_pb2.STAGE_VAE:
        made, of = status.frames, _frames(status.params)
    return first + (last - first) * min(made, of) // max(of, 1)
