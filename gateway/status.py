"""Requests between what clients see and what Redis has of them: parameters in, status out."""

from __future__ import annotations

import hashlib
from typing import Any, cast

from gateway.cost import pixels
from gateway.records import TERMINAL
from gateway.work import busy_in
from protos import gateway_pb2, types_pb2
from services.request import GenerationParams, ResolvedParams
from services.wire import params_to_proto

_STAGES = {b"dit": types_pb2.STAGE_DIT, b"vae": types_pb2.STAGE_VAE}


def digest_of(params: GenerationParams, priority: int) -> str:
    """Of what the client asked for, before anything is filled in: a drawn seed must not tell two tries apart."""
    asked = params_to_proto(params).SerializeToString(deterministic=True)
    return hashlib.sha256(b"%d/%b" % (priority, asked)).hexdigest()


def stored_params(params: ResolvedParams) -> tuple[bytes, bytes]:
    """The parameters as the record has them, with the kinds of pictures only: it goes along with every status.

    And the pictures, b"" when there are none; Work.take_inputs puts them back.
    """
    message = params_to_proto(params)
    inputs = types_pb2.GenerationParams(inputs=message.inputs).SerializeToString()
    for media in message.inputs:
        media.data = b""
    return message.SerializeToString(), inputs


def record_fields(params: ResolvedParams, stored: bytes) -> dict[str, str | bytes | float]:
    """What a record has of the parameters, beside them as they are stored."""
    return {
        "params": stored,
        "model": params.model,
        "input_bytes": " ".join(str(len(media.data)) for media in params.inputs),
        "total": params.steps,
        "pixels": pixels(params),
        "step": 0,
    }


def state_number(name: str) -> gateway_pb2.RequestState:
    """ "queued" as the proto's number."""
    number: Any = gateway_pb2.RequestState.Value(f"REQUEST_STATE_{name.upper()}")
    return cast(gateway_pb2.RequestState, number)


def status_of(request_id: str, record: dict[str, bytes]) -> gateway_pb2.RequestStatus:
    """A stored record as clients see it; of inputs only their kind."""
    status = gateway_pb2.RequestStatus(
        request_id=request_id,
        state=state_number(record["state"].decode()),
        stage=_STAGES.get(record.get("stage", b""), types_pb2.STAGE_UNSPECIFIED),
        step=int(record.get("step", 0)),
        total_steps=int(record.get("total", 0)),
        frames=int(record.get("frames", 0)),
        attempt=max(0, int(record.get("attempt", 0))),
        created_unix_s=float(record["created"]),
        updated_unix_s=float(record["updated"]),
        params=types_pb2.GenerationParams.FromString(record["params"]),
        busy_s=busy_in(record),
        queued_s=float(record.get("queued_s", 0)),
        input_bytes=[int(nbytes) for nbytes in record.get("input_bytes", b"").split()],
    )
    if "artifact" in record:
        status.artifact.ParseFromString(record["artifact"])
    if "error" in record and record["state"].decode() in TERMINAL:
        status.error.ParseFromString(record["error"])
        status.error.request_id = request_id
    return status
