"""Between protos and the plain data of `services/request.py` and `services/errors.py`. No torch, no gRPC calls."""

from __future__ import annotations

from dataclasses import fields

from protos import types_pb2
from services.errors import ErrorRecord, InvalidRequest, ServiceError
from services.request import GenerationParams, Limits, Media, ResolvedParams

PROTOCOL_VERSION = 1
ERROR_TRAILER = "lightloom-error-bin"

_FORMATS = {
    types_pb2.OUTPUT_FORMAT_PNG: "png",
    types_pb2.OUTPUT_FORMAT_JPEG: "jpeg",
    types_pb2.OUTPUT_FORMAT_WEBP: "webp",
    types_pb2.OUTPUT_FORMAT_MP4: "mp4",
    types_pb2.OUTPUT_FORMAT_WAV: "wav",
    types_pb2.OUTPUT_FORMAT_FLAC: "flac",
    types_pb2.OUTPUT_FORMAT_RAW: "raw",
}
_FORMAT_NUMBERS = {name: number for number, name in _FORMATS.items()}
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


def params_to_proto(params: GenerationParams | ResolvedParams) -> types_pb2.GenerationParams:
    """The request as it travels; fields that are None stay unset."""
    proto = types_pb2.GenerationParams(model=params.model, prompt=params.prompt, preview_every=params.preview_every)
    for name in _OPTIONAL:
        value = getattr(params, name)
        if value is not None:
            setattr(proto, name, value)
    if params.output_format is not None:
        proto.output_format = _FORMAT_NUMBERS[params.output_format]
    proto.inputs.extend(media_to_proto(media) for media in params.inputs)
    return proto


def params_from_proto(proto: types_pb2.GenerationParams) -> GenerationParams:
    """The request as it came.

    Raises:
        InvalidRequest: an output format of a newer protocol.
    """
    output_format = None
    if proto.output_format:
        output_format = _FORMATS.get(proto.output_format)
        if output_format is None:
            raise InvalidRequest(f"output_format {proto.output_format} is unknown", param="output_format")
    optional = {name: getattr(proto, name) if proto.HasField(name) else None for name in _OPTIONAL}
    return GenerationParams(
        model=proto.model,
        prompt=proto.prompt,
        output_format=output_format,
        preview_every=proto.preview_every,
        inputs=tuple(media_from_proto(media) for media in proto.inputs),
        **optional,
    )


def resolved_from_proto(proto: types_pb2.GenerationParams) -> ResolvedParams:
    """The complete request a gateway sends to a stage.

    Raises:
        InvalidRequest: a field is not set.
    """
    params = params_from_proto(proto)
    missing = [f.name for f in fields(params) if getattr(params, f.name) is None]
    if missing:
        raise InvalidRequest(f"a stage needs complete parameters: {missing[0]} is not set", param=missing[0])
    return ResolvedParams(**{f.name: getattr(params, f.name) for f in fields(params)})


def media_to_proto(media: Media) -> types_pb2.Media:
    """Encoded media for the wire."""
    return types_pb2.Media(mime=media.mime, data=media.data, role=media.role)


def media_from_proto(proto: types_pb2.Media) -> Media:
    """Encoded media from the wire; the role is "image" when none is given."""
    return Media(proto.mime, proto.data, proto.role or "image")


def limits_to_proto(limits: Limits) -> types_pb2.Limits:
    """Field by field: the names are equal."""
    return types_pb2.Limits(**{f.name: getattr(limits, f.name) for f in fields(limits)})


def limits_from_proto(proto: types_pb2.Limits) -> Limits:
    """Field by field: the names are equal."""
    return Limits(**{f.name: getattr(proto, f.name) for f in fields(Limits)})


def error_to_proto(error: ServiceError) -> types_pb2.ErrorDetail:
    """The detail that travels in a trailer or an event."""
    return types_pb2.ErrorDetail(
        reason=error.reason,
        message=error.message,
        request_id=error.request_id,
        retryable=error.retryable,
        retry_after_s=error.retry_after_s,
        param=error.param,
    )


def error_from_proto(detail: types_pb2.ErrorDetail) -> ServiceError:
    """The exception again."""
    return ErrorRecord(detail.reason, detail.message, detail.param, detail.request_id, detail.retry_after_s).error()
