"""How one process calls another: channels, deadlines that shrink, and errors that keep their meaning.

Nothing is retried here. A stage call is not idempotent while its request has a lease; the gateway decides what runs
again, under a new fence.
"""

from __future__ import annotations

import time
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from protos import types_pb2
from services.errors import (
    Cancelled,
    DeadlineExceeded,
    DeviceLost,
    Internal,
    InvalidRequest,
    NotEnabled,
    Overloaded,
    ServiceError,
    UnknownRequest,
)
from services.wire import ERROR_TRAILER, error_from_proto

MESSAGE_CAP_BYTES = 16 * 1024 * 1024
# A peer that freezes is noticed within ping interval + timeout. BDP probing stays off: its pings count as abuse.
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MESSAGE_CAP_BYTES),
    ("grpc.max_send_message_length", MESSAGE_CAP_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
    ("grpc.http2.lookahead_bytes", 4 * 1024 * 1024),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

_BY_STATUS: dict[grpc.StatusCode, type[ServiceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: UnknownRequest,
    grpc.StatusCode.UNIMPLEMENTED: NotEnabled,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: DeviceLost,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def connect(address: str) -> grpc.aio.Channel:
    """A channel to `host:port`; it connects when first used and reconnects by itself."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def remaining(deadline_unix_s: float) -> float:
    """Seconds left until the deadline, as the timeout of the next hop.

    Raises:
        DeadlineExceeded: none is left.
    """
    left_s = deadline_unix_s - time.time()
    if left_s <= 0:
        raise DeadlineExceeded("the request's deadline has passed")
    return left_s


def error_from_rpc(error: grpc.RpcError) -> ServiceError:
    """What the peer meant: its error detail if it sent one, else by gRPC status."""
    trailers: Any = error.trailing_metadata() or () if hasattr(error, "trailing_metadata") else ()
    for key, value in trailers:
        if key == ERROR_TRAILER:
            try:
                return error_from_proto(types_pb2.ErrorDetail.FromString(value))
            except DecodeError:
                break
    code: Any = error.code() if hasattr(error, "code") else None
    details = (error.details() if hasattr(error, "details") else None) or str(error)
    return _BY_STATUS.get(code, Internal)(details)
