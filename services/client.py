"""How we call another service: channel options, deadlines that shrink, and errors as our own classes.

Retries are off: a stream cannot be repeated safely below the one who knows what it was for. The gateway claims a
request again instead.
"""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from protos import types_pb2
from services.config import TlsSection
from services.errors import (
    CorruptTensor,
    DeadlineExceeded,
    DeviceLost,
    Internal,
    InvalidRequest,
    KeyReused,
    NotEnabled,
    NotReady,
    Overloaded,
    PermissionDenied,
    ServiceError,
    Unauthenticated,
    UnknownRequest,
    WrongState,
)
from services.tls import channel_credentials
from services.wire import error_from_proto

ERROR_KEY = "lightloom-error-bin"
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

SIZE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)
KEEPALIVE_S = 10.0

# How much of a stream may be on its way. gRPC's own guess grows with the buffers of a slow line, until a ping that
# comes behind them is given up and the transfer with it.
WINDOW_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024 * 1024),
)


def keepalive_options(keepalive_s: float = KEEPALIVE_S) -> tuple[tuple[str, int], ...]:
    """Pings after `keepalive_s` of silence; a peer that does not answer within half of it is given up.

    A frozen peer's kernel still acknowledges, so gRPC's keepalive timeout alone does not see it; the ping timeout does.
    """
    return (
        ("grpc.keepalive_time_ms", int(1000 * keepalive_s)),
        ("grpc.keepalive_timeout_ms", int(500 * keepalive_s)),
        ("grpc.http2.ping_timeout_ms", int(500 * keepalive_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )


CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *keepalive_options(),
    *SIZE_OPTIONS,
    *WINDOW_OPTIONS,
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    # What one attempt may take, whatever its name says. TLS takes three or four round trips, and a peer may be far
    # away; who calls a host that answers nothing hears of it after as long.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

# What a status means when no ErrorDetail came with it: the call failed before our own code, or in a proxy.
_BY_STATUS: dict[grpc.StatusCode, type[ServiceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: UnknownRequest,
    grpc.StatusCode.ALREADY_EXISTS: KeyReused,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNIMPLEMENTED: NotEnabled,
    grpc.StatusCode.FAILED_PRECONDITION: WrongState,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    # Not by us: then there would be no status. A server that stops says so of calls that just came in.
    grpc.StatusCode.CANCELLED: NotReady,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.DATA_LOSS: CorruptTensor,
}


def connect(address: str, *, tls: TlsSection | None = None, keepalive_s: float = KEEPALIVE_S) -> grpc.aio.Channel:
    """A channel to `host:port` (or any gRPC target); it connects when first used and again whenever it breaks.

    A frozen peer is noticed after one and a half `keepalive_s`.

    Raises:
        StartupError: a certificate of `tls` cannot be used.
    """
    merged: dict[str, int | str] = {**dict(CHANNEL_OPTIONS), **dict(keepalive_options(keepalive_s))}
    if tls is None or not tls.on:
        return grpc.aio.insecure_channel(address, options=tuple(merged.items()))
    if tls.server_name:
        merged["grpc.ssl_target_name_override"] = tls.server_name
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=tuple(merged.items()))


# What grpc.aio says when a call has ended while a message was being written.
WRITE_FAILED = "Internal error from Core"


def error_from_rpc(error: grpc.RpcError) -> ServiceError:
    """A failed call (sync or async) as one of our errors: from its ErrorDetail, else by its status."""
    call: Any = error
    if not hasattr(call, "trailing_metadata"):
        return Internal(str(error))
    for key, value in call.trailing_metadata() or ():
        if key == ERROR_KEY:
            with contextlib.suppress(DecodeError):
                return error_from_proto(types_pb2.ErrorDetail.FromString(value))
    code, details = call.code(), call.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unavailable(details)
    if code is grpc.StatusCode.INTERNAL and details == WRITE_FAILED:
        # What the peer ended the call with is lost. Most often it refused the call while the first messages were under
        # way, and nothing has been worked on: that must not count as an attempt.
        return NotReady("the call was over before its messages were written")
    if code is grpc.StatusCode.INTERNAL:
        # Our servers send their own detail with it. Without one, gRPC lost the stream or, when the peer refused the
        # call before its headers were out, the true status.
        return DeviceLost(f"the call broke: {details}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return InvalidRequest(f"a message is too large: at most {MAX_MESSAGE_BYTES} bytes are allowed ({details})")
    return _BY_STATUS.get(code, Internal)(details or code.name.lower())


def _unavailable(details: str) -> ServiceError:
    # Nobody listens: it may start soon. Anything else broke a connection that stood: the peer or its host is gone.
    lower = details.lower()
    if "failed to connect" not in lower and "name resolution" not in lower:
        return DeviceLost(f"the connection broke: {details}")
    if "expected settings frame" in lower:
        return NotReady("what answers there speaks HTTP/1, not gRPC: give the gateway's gRPC port, not its REST port")
    if "wrong_version_number" in lower:
        return NotReady(f"TLS handshake failed: the service speaks plain text ({details})")
    if "handshake failed" in lower or "verification" in lower:
        return NotReady(f"TLS handshake failed: the service's certificate is not accepted ({details})")
    if "socket closed" in lower:
        return NotReady(
            "the service closes connections at once: does it speak TLS, ask for a client certificate, or refuse ours? "
            f"({details})"
        )
    return NotReady(f"no service answers: {details}")
