"""Protos to plain data and back, without torch: parameters, limits, media, errors.

Nothing else reads the fields of these messages. What comes from outside is checked here as far as the form goes;
values are checked against a model's limits in `services/request.py`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from protos import types_pb2, vae_pb2
from services.errors import ErrorRecord, InvalidRequest, ServiceError
from services.request import GenerationParams, InterpolationLimits, Limits, Media, ResolvedParams, check

_log = logging.getLogger(__name__)

PROTOCOL_VERSION = 1
MEDIA_CHUNK_BYTES = 1024 * 1024
OUTPUT_FORMATS: dict[str, types_pb2.OutputFormat] = {
    "png": types_pb2.OUTPUT_FORMAT_PNG,
    "jpeg": types_pb2.OUTPUT_FORMAT_JPEG,
    "webp": types_pb2.OUTPUT_FORMAT_WEBP,
    "mp4": types_pb2.OUTPUT_FORMAT_MP4,
    "wav": types_pb2.OUTPUT_FORMAT_WAV,
    "flac": types_pb2.OUTPUT_FORMAT_FLAC,
    "raw": types_pb2.OUTPUT_FORMAT_RAW,
    "zip": types_pb2.OUTPUT_FORMAT_ZIP,
    "gif": types_pb2.OUTPUT_FORMAT_GIF,
}
_FORMAT_NAMES = {number: name for name, number in OUTPUT_FORMATS.items()}

# Fields with presence: absent means the model's default.
_OPTIONAL = (
    "negative_prompt",
    "width",
    "height",
    "num_frames",
    "fps",
    "steps",
    "guidance",
    "guidance_2",
    "seed",
    "quality",
)
# The second and third have presence: absent means the default.
_INTERPOLATION = ("enable_frame_interpolation", "frame_interpolation_exp", "frame_interpolation_scale")
# What a model allows is less; only its replicas know it.
_ALLOWED = {
    FieldDescriptor.TYPE_STRING: "text of whole Unicode characters",
    FieldDescriptor.TYPE_BOOL: "True or False",
    FieldDescriptor.TYPE_DOUBLE: "a number",
    FieldDescriptor.TYPE_UINT32: "a whole number between 0 and 2^32 - 1",
    FieldDescriptor.TYPE_UINT64: "a whole number between 0 and 2^64 - 1",
}
# An error travels in trailing metadata, of which a peer accepts 8 KiB.
MAX_ERROR_CHARS = 2000


@contextlib.contextmanager
def parsing() -> Iterator[None]:
    """Around the parsing of a peer's message, and no more: bytes that make no sense are the peer's fault.

    The log has the trace, in case that they do.

    Raises:
        InvalidRequest: the message cannot be parsed, or has values that cannot be read.
    """
    try:
        yield
    except (DecodeError, KeyError, ValueError, TypeError) as error:
        _log.warning("a message cannot be read", exc_info=error)
        raise InvalidRequest(f"a message cannot be read: {type(error).__name__}") from error


def params_to_proto(params: GenerationParams | ResolvedParams) -> types_pb2.GenerationParams:
    """The request as a message; None stays absent.

    Raises:
        InvalidRequest: a value that the message's type cannot hold (a negative width), or an unknown format.
    """
    proto = types_pb2.GenerationParams(inputs=[media_to_proto(media) for media in params.inputs])
    # Resolved, they are set where nothing is to be interpolated, too.
    asked = params.enable_frame_interpolation or isinstance(params, GenerationParams)
    for name in ("model", "prompt", *_OPTIONAL, "preview_every", *(_INTERPOLATION if asked else ())):
        value = getattr(params, name)
        if value is not None:
            _set(proto, name, value)
    if params.output_format is not None:
        proto.output_format = format_to_proto(params.output_format)
    return proto


def params_from_proto(proto: types_pb2.GenerationParams) -> GenerationParams:
    """The message as an open request: absent fields are None.

    Raises:
        InvalidRequest: an output format that this build does not know.
    """
    names = (*_OPTIONAL, *_INTERPOLATION[1:])
    optional: dict[str, Any] = {name: getattr(proto, name) if proto.HasField(name) else None for name in names}
    return GenerationParams(
        model=proto.model,
        prompt=proto.prompt,
        output_format=format_from_proto(proto.output_format),
        preview_every=proto.preview_every,
        inputs=tuple(media_from_proto(media) for media in proto.inputs),
        enable_frame_interpolation=proto.enable_frame_interpolation,
        **optional,
    )


def resolved_from_proto(proto: types_pb2.GenerationParams) -> ResolvedParams:
    """The message as complete parameters, as stages get them.

    Raises:
        InvalidRequest: a field is absent; the gateway fills all of them in.
    """
    params = params_from_proto(proto)
    values = {spec.name: getattr(params, spec.name) for spec in fields(params)}
    for name in _INTERPOLATION[1:]:
        if values[name] is None:
            del values[name]
    missing = [name for name, value in values.items() if value is None] + ([] if params.model else ["model"])
    if missing:
        raise InvalidRequest(
            f"params.{missing[0]} is not set: a stage needs complete parameters, as a gateway makes them",
            param=missing[0],
        )
    return ResolvedParams(**values)


def checked_from_proto(proto: types_pb2.GenerationParams, limits: Limits) -> ResolvedParams:
    """The message as complete parameters that keep within a stage's limits.

    Raises:
        InvalidRequest: as resolved_from_proto, or a value is outside the limits.
    """
    params = resolved_from_proto(proto)
    check(params, limits)
    return params


def limits_to_proto(limits: Limits) -> types_pb2.Limits:
    """A model's limits as a message."""
    return types_pb2.Limits(**asdict(limits))


def limits_from_proto(proto: types_pb2.Limits) -> Limits:
    """The message as a model's limits."""
    limits = Limits(**{spec.name: getattr(proto, spec.name) for spec in fields(Limits)})
    return replace(
        limits,
        min_steps=max(1, limits.min_steps),
        needed_roles=tuple(proto.needed_roles),
        optional_roles=tuple(proto.optional_roles),
    )


def interpolation_limits_to_proto(limits: InterpolationLimits) -> types_pb2.InterpolationLimits:
    """What interpolation accepts, as a message."""
    return types_pb2.InterpolationLimits(**asdict(limits))


def interpolation_limits_from_proto(proto: types_pb2.InterpolationLimits) -> InterpolationLimits:
    """The message as what interpolation accepts."""
    return InterpolationLimits(**{spec.name: getattr(proto, spec.name) for spec in fields(InterpolationLimits)})


def media_to_proto(media: Media) -> types_pb2.Media:
    """An encoded picture or clip as a message."""
    return types_pb2.Media(mime=media.mime, data=media.data, role=media.role)


def media_from_proto(proto: types_pb2.Media) -> Media:
    """The message as an encoded picture or clip; no role means "image"."""
    return Media(proto.mime, proto.data, proto.role or "image")


def format_to_proto(name: str) -> types_pb2.OutputFormat:
    """ "png" to OUTPUT_FORMAT_PNG.

    Raises:
        InvalidRequest: no such format.
    """
    if name not in OUTPUT_FORMATS:
        raise InvalidRequest(
            f"output_format {name!r} is unknown: use one of {', '.join(OUTPUT_FORMATS)}", param="output_format"
        )
    return OUTPUT_FORMATS[name]


def format_from_proto(number: types_pb2.OutputFormat) -> str | None:
    """OUTPUT_FORMAT_PNG to "png", OUTPUT_FORMAT_UNSPECIFIED to None.

    Raises:
        InvalidRequest: a number of a newer peer.
    """
    if number == types_pb2.OUTPUT_FORMAT_UNSPECIFIED:
        return None
    if number not in _FORMAT_NAMES:
        raise InvalidRequest(f"output_format {number} is unknown to this build", param="output_format")
    return _FORMAT_NAMES[number]


def error_to_proto(error: ServiceError) -> types_pb2.ErrorDetail:
    """An error as a message; a very long text is cut."""
    return types_pb2.ErrorDetail(
        reason=error.reason,
        message=error.message[:MAX_ERROR_CHARS],
        request_id=error.request_id,
        retryable=error.retryable,
        retry_after_s=error.retry_after_s,
        param=error.param,
    )


def error_from_proto(proto: types_pb2.ErrorDetail) -> ServiceError:
    """The message as an exception; an unknown reason becomes Internal."""
    return ErrorRecord(proto.reason, proto.message, proto.param, proto.request_id, proto.retry_after_s).error()


def _set(proto: types_pb2.GenerationParams, name: str, value: Any) -> None:
    try:
        setattr(proto, name, value)
    except (ValueError, TypeError) as error:
        allowed = _ALLOWED[proto.DESCRIPTOR.fields_by_name[name].type]
        raise InvalidRequest(f"{name} is {repr(value)[:60]}: it must be {allowed}", param=name) from error


def media_messages(header: types_pb2.MediaHeader, data: bytes, nbytes: int | None = None) -> Iterator[bytes]:
    """Media as the last stage answers them, a VAE and an interpolator alike; `header` gets the size.

    Args:
        nbytes: of all, where `data` are only the first.
    """
    header.nbytes = len(data) if nbytes is None else nbytes
    yield vae_pb2.DecodeResponse(media=header).SerializeToString()
    yield from media_chunks(data)


def media_chunks(data: bytes) -> Iterator[bytes]:
    """Bytes of media as messages, of which the header has gone before."""
    for offset in range(0, len(data), MEDIA_CHUNK_BYTES):
        response = vae_pb2.DecodeResponse()
        response.chunk.data = data[offset : offset + MEDIA_CHUNK_BYTES]
        yield response.SerializeToString()
