"""The gateway's messages as the JSON of its REST API. Used by the REST routes; pure functions."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from gateway.http_errors import service_envelope
from protos import gateway_pb2, types_pb2
from services.errors import ErrorRecord, Internal, ServiceError


def state_name(state: int) -> str:
    """ "queued", "running", ..."""
    return gateway_pb2.RequestState.Name(state).removeprefix("REQUEST_STATE_").lower()


def stage_name(stage: int) -> str | None:
    """ "text_encoder", "dit", ...; None before the first stage."""
    return types_pb2.Stage.Name(stage).removeprefix("STAGE_").lower() if stage else None


def status_json(status: gateway_pb2.RequestStatus) -> dict[str, Any]:
    """A request: its state, progress, parameters, result and error."""
    error = error_of(status.error)["error"] if status.HasField("error") else None
    return {
        "id": status.request_id,
        "object": "request",
        "state": state_name(status.state),
        "stage": stage_name(status.stage),
        "step": status.step,
        "total_steps": status.total_steps,
        "frames": status.frames,
        "attempt": status.attempt,
        "created_at": status.created_unix_s,
        "updated_at": status.updated_unix_s,
        "params": params_json(status.params, status.input_bytes),
        "artifact": fields_json(status.artifact) if status.HasField("artifact") else None,
        "error": error,
        "busy_s": dict(status.busy_s),
        "queued_s": status.queued_s,
    }


def params_json(params: types_pb2.GenerationParams, input_bytes: Sequence[int] = ()) -> dict[str, Any]:
    """The parameters that are set; of inputs, their type, role and size (`input_bytes`, of each) only."""
    plain = fields_json(params)
    output_format = plain.pop("output_format", None)
    if output_format:
        plain["output_format"] = types_pb2.OutputFormat.Name(output_format).removeprefix("OUTPUT_FORMAT_").lower()
    inputs = [
        {"mime": item.mime, "role": item.role, "nbytes": nbytes}
        for item, nbytes in zip(params.inputs, input_bytes, strict=False)
    ]
    return {**plain, "inputs": inputs} if inputs else plain


def model_json(model: gateway_pb2.ModelInfo) -> dict[str, Any]:
    """OpenAI's model object, with what the model allows and who serves it."""
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "lightloom",
        "family": model.family,
        "variants": list(model.variants),
        "ready": model.ready,
        "missing_experts": list(model.missing_experts),
        "limits": every_field_json(model.limits)
        | {"needed_roles": list(model.limits.needed_roles), "optional_roles": list(model.limits.optional_roles)},
        "replicas": [{**every_field_json(item), "stage": stage_name(item.stage)} for item in model.replicas],
    }


def span_json(span: types_pb2.Span) -> dict[str, Any]:
    """One piece of a request's timeline."""
    return {
        "name": span.name,
        "process": span.process,
        "start_unix_ns": span.start_unix_ns,
        "duration_ns": span.duration_ns,
        "attributes": dict(span.attributes),
    }


def event_json(event: gateway_pb2.GenerateResponse) -> tuple[str, dict[str, Any]]:
    """Name and data of an event of a request: a status, a step or a preview."""
    kind = event.WhichOneof("event")
    if kind == "status":
        return "status", status_json(event.status)
    if kind == "step":
        return "step", every_field_json(event.step)
    if kind == "preview":
        return "preview", {"mime": event.preview.mime, "b64": base64.b64encode(event.preview.data).decode()}
    raise Internal(f"a request has an event of no known kind: {kind}")


def error_of(detail: types_pb2.ErrorDetail) -> dict[str, Any]:
    """OpenAI's envelope of an error from the wire."""
    return service_envelope(error_from(detail))


def error_from(detail: types_pb2.ErrorDetail) -> ServiceError:
    """The exception of an error from the wire."""
    return ErrorRecord(detail.reason, detail.message, detail.param, detail.request_id, detail.retry_after_s).error()


def fields_json(message: Message) -> dict[str, Any]:
    """The scalar fields of a message that are set, under their proto names."""
    return {spec.name: value for spec, value in message.ListFields() if not spec.is_repeated}


def every_field_json(message: Message) -> dict[str, Any]:
    """All scalar fields of a message, those at their default too."""
    values = fields_json(message)
    return {
        spec.name: values.get(spec.name, spec.default_value)
        for spec in message.DESCRIPTOR.fields
        if not spec.is_repeated
    }
