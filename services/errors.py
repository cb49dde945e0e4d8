"""The errors that cross a border, and the one table that maps them to gRPC and HTTP.

Engines and fronts raise these; `server.py` turns them into a gRPC status with an `ErrorDetail`, the REST
front into an HTTP status with the OpenAI envelope. Anything else that escapes is a bug: it becomes
INTERNAL with an id, and its trace goes to the log only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Code(Enum):
    """The gRPC status codes we use, by name, so that nothing here needs grpc."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    UNAVAILABLE = "UNAVAILABLE"
    CANCELLED = "CANCELLED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"


class ServiceError(Exception):
    """Root of all errors a caller may see.

    `message` says what was wrong and what is allowed. `param` names the parameter at fault.
    """

    reason = "internal"
    code = Code.INTERNAL
    http = 500
    retryable = False

    def __init__(self, message: str, *, param: str = "", request_id: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class InvalidRequest(ServiceError):
    """The caller asked for something no replica could do.

    A stage names the parameter at fault. One without a name is about tensors, so about the stage that sent them.
    """

    reason, code, http = "invalid_request", Code.INVALID_ARGUMENT, 400


class Unauthenticated(ServiceError):
    """No API key, or one that is not known (any more)."""

    reason, code, http = "unauthenticated", Code.UNAUTHENTICATED, 401


class PermissionDenied(ServiceError):
    """The API key lacks the scope that the call needs."""

    reason, code, http = "permission_denied", Code.PERMISSION_DENIED, 403


class QuotaExceeded(ServiceError):
    """The API key has used up what it may ask for; without `retry_after_s`, the request is above the whole quota."""

    reason, code, http = "quota_exceeded", Code.RESOURCE_EXHAUSTED, 429


class KeyReused(ServiceError):
    """An idempotency key came again with another body."""

    reason, code, http = "idempotency_key_reused", Code.ALREADY_EXISTS, 409


class UnknownModel(ServiceError):
    """No replica announces that model."""

    reason, code, http = "unknown_model", Code.NOT_FOUND, 404

    def __init__(self, message: str, *, param: str = "model", request_id: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message, param=param, request_id=request_id, retry_after_s=retry_after_s)


class UnknownRequest(ServiceError):
    """No request has that id, or it has been forgotten."""

    reason, code, http = "unknown_request", Code.NOT_FOUND, 404


class NotEnabled(ServiceError):
    """An RPC or feature that this deployment does not have."""

    reason, code, http = "not_enabled", Code.UNIMPLEMENTED, 501


class WrongState(ServiceError):
    """Right call, wrong time."""

    reason, code, http = "wrong_state", Code.FAILED_PRECONDITION, 409


class StaleFence(ServiceError):
    """The caller lost its lease: a newer owner has the request."""

    reason, code, http = "stale_fence", Code.FAILED_PRECONDITION, 409


class Overloaded(ServiceError):
    """A queue or a replica is full; try another replica, or later."""

    reason, code, http, retryable = "overloaded", Code.RESOURCE_EXHAUSTED, 429, True


class OutOfMemory(ServiceError):
    """The request does not fit into the device's memory."""

    reason, code, http = "out_of_memory", Code.RESOURCE_EXHAUSTED, 413


class NotReady(ServiceError):
    """Starting, draining, or without a healthy replica."""

    reason, code, http, retryable = "not_ready", Code.UNAVAILABLE, 503, True


class DeviceLost(ServiceError):
    """A rank died, or its device did; the request can run elsewhere with the same result."""

    reason, code, http, retryable = "device_lost", Code.UNAVAILABLE, 503, True


class StateStoreDown(ServiceError):
    """Redis does not answer."""

    reason, code, http, retryable = "state_store_down", Code.UNAVAILABLE, 503, True


class ArtifactStoreDown(ServiceError):
    """The folder or bucket of the artifacts does not answer, or refuses this gateway."""

    reason, code, http, retryable = "artifact_store_down", Code.UNAVAILABLE, 503, True


class ArtifactStoreFull(ServiceError):
    """The folder or bucket of the artifacts has no room left."""

    reason, code, http, retryable = "artifact_store_full", Code.RESOURCE_EXHAUSTED, 507, True


class CorruptArtifact(ServiceError):
    """A stored artifact is not what was written: cut short, changed, or with a manifest of something else."""

    reason, code, http = "corrupt_artifact", Code.DATA_LOSS, 502


class LinkRefused(ServiceError):
    """A link to an artifact has a signature, but not ours."""

    reason, code, http = "link_refused", Code.PERMISSION_DENIED, 403


class LinkExpired(ServiceError):
    """A link to an artifact was good once."""

    reason, code, http = "link_expired", Code.FAILED_PRECONDITION, 410


class CorruptTensor(ServiceError):
    """A tensor stream was cut, out of order, or failed its checksum."""

    reason, code, http, retryable = "corrupt_tensor", Code.DATA_LOSS, 502, True


class StageMismatch(ServiceError):
    """A stage sent tensors of a name, shape or dtype that the next one cannot take: a deployment mixes models."""

    reason, code, http = "stage_mismatch", Code.INTERNAL, 502


class NonFinite(ServiceError):
    """Latents became NaN or infinite; the message names the step."""

    reason, code, http = "non_finite", Code.INTERNAL, 500


class Cancelled(ServiceError):
    """The caller aborted the request."""

    reason, code, http = "cancelled", Code.CANCELLED, 499


class DeadlineExceeded(ServiceError):
    """The request's deadline passed."""

    reason, code, http = "deadline_exceeded", Code.DEADLINE_EXCEEDED, 504


class Internal(ServiceError):
    """A bug; the message holds only the id under which the log has the trace."""


class StartupError(Exception):
    """A process cannot start: bad config, missing weights, port in use. Printed without a trace, exit code 2."""


ERRORS: dict[str, type[ServiceError]] = {
    cls.reason: cls
    for cls in (
        InvalidRequest,
        Unauthenticated,
        PermissionDenied,
        QuotaExceeded,
        KeyReused,
        UnknownModel,
        UnknownRequest,
        NotEnabled,
        WrongState,
        StaleFence,
        Overloaded,
        OutOfMemory,
        NotReady,
        DeviceLost,
        StateStoreDown,
        ArtifactStoreDown,
        ArtifactStoreFull,
        CorruptArtifact,
        LinkRefused,
        LinkExpired,
        CorruptTensor,
        StageMismatch,
        NonFinite,
        Cancelled,
        DeadlineExceeded,
        Internal,
    )
}


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """A ServiceError as plain data, for the rank channel, Redis and the wire."""

    reason: str
    message: str
    param: str = ""
    request_id: str = ""
    retry_after_s: float = 0.0

    @classmethod
    def of(cls, error: ServiceError) -> ErrorRecord:
        """Flattens `error`."""
        return cls(error.reason, error.message, error.param, error.request_id, error.retry_after_s)

    def error(self) -> ServiceError:
        """The exception again; an unknown reason (a newer peer) becomes Internal."""
        cls = ERRORS.get(self.reason, Internal)
        return cls(self.message, param=self.param, request_id=self.request_id, retry_after_s=self.retry_after_s)
