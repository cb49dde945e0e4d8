"""What every gRPC server of Lightloom shares: options, ports, errors to statuses, and the start of a process."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import grpc

from services.client import CHANNEL_OPTIONS
from services.config import MALLOC_SETTINGS, environment, environment_with_malloc, override, read_toml
from services.errors import Internal, ServiceError, StartupError
from services.telemetry import request_id_var
from services.wire import ERROR_TRAILER, error_to_proto

log = logging.getLogger(__name__)

SERVER_OPTIONS: list[tuple[str, int]] = [
    *CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
]
STARTUP_ERROR_CODE = 2


def ensure_malloc() -> None:
    """Starts this program again with the allocator settings, unless they stand already (malloc reads them once)."""
    if any(environment(name) != value for name, value in MALLOC_SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment_with_malloc())


def read_arguments(description: str, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """`--config FILE` and `--set section.key=value` of every service, as one table.

    Raises:
        StartupError: the file or a setting is wrong.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides the file")
    args = parser.parse_args(arguments)
    return override(read_toml(args.config), args.set)


def run_service(serve: Callable[[], None]) -> NoReturn:
    """Runs a service's main function. A start that cannot work ends with one line and exit code 2."""
    try:
        serve()
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stderr.flush()
        os._exit(STARTUP_ERROR_CODE)
    except KeyboardInterrupt:
        os._exit(130)
    sys.stderr.flush()
    # Worker threads of gRPC and metrics may outlive the loop; nothing of theirs is worth waiting for.
    os._exit(0)


def bind(server: grpc.aio.Server, host: str, port: int) -> int:
    """Listens; returns the port (a free one for 0).

    Raises:
        StartupError: the port is in use, or the host is not ours.
    """
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {host}:{port}: the port is in use or the host is unknown") from error
    if bound == 0:
        raise StartupError(f"cannot listen on {host}:{port}: the port is in use or the host is unknown")
    return bound


async def abort_with(context: Any, error: Exception) -> NoReturn:
    """Ends a call with the status and detail of an error. A bug becomes INTERNAL with an id; its trace is logged."""
    failure = visible(error)
    context.set_trailing_metadata(((ERROR_TRAILER, error_to_proto(failure).SerializeToString()),))
    await context.abort(grpc.StatusCode[failure.code.name], failure.message)
    raise AssertionError("abort returned")


def visible(error: Exception) -> ServiceError:
    """The error itself when it is ours, else Internal with an id under which the log has the trace."""
    if isinstance(error, ServiceError):
        return error
    bug_id = uuid.uuid4().hex[:12]
    log.error("bug %s", bug_id, exc_info=error)
    return Internal(f"internal error {bug_id}: the log has the details", request_id=request_id_var.get())
