"""What every gRPC server of ours does alike: arguments, options, health, reflection, errors, exit codes.

Used by `services/front.py` and by the gateway. Knows no torch.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import inspect
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.client import ERROR_KEY, SIZE_OPTIONS, WINDOW_OPTIONS, keepalive_options
from services.config import MALLOC_SETTINGS, environment, environment_with_malloc, override, parse, read_toml
from services.errors import ServiceError, StartupError
from services.telemetry import internal_error
from services.tls import ServerCertificates
from services.wire import MAX_ERROR_CHARS, error_to_proto

T = TypeVar("T")
STARTUP_ERROR_CODE = 2
LIVE = "live"
# gRPC ended the call by itself (a message over its own cap): nobody is left to answer.
_CALL_OVER = "gRPC ended the call"
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *keepalive_options(),
    *SIZE_OPTIONS,
    *WINDOW_OPTIONS,
    # Clients ping every 10 s; a server that finds that too often would hang up on them.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Two processes on one port would share its connections without anyone noticing.
    ("grpc.so_reuseport", 0),
)


def parse_arguments(cls: type[T], description: str, arguments: Sequence[str] | None = None) -> T:
    """The command line of every process: `--config FILE [--set section.key=value ...]` as its config.

    Raises:
        StartupError: the file or a setting is wrong.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, required=True, help="configuration file (TOML)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value of the file"
    )
    parsed = parser.parse_args(arguments)
    return parse(cls, override(read_toml(parsed.config), parsed.set))


def ensure_malloc() -> None:
    """Starts this process again with the allocator settings that tensor transport needs, unless they stand already.

    They are read before the first line of Python runs, so a new exec is the only way. Call it first thing in main.
    """
    if all(environment(name) for name in MALLOC_SETTINGS):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment_with_malloc())


def run_service(serve: Callable[[], None]) -> NoReturn:
    """Runs a process's main function to its end. What cannot start leaves one line, the log's last, and exit code 2.

    What breaks later leaves its trace in the log, and exit code 1.
    """
    # What has been imported stays: a collection that looks through it (the gateway's: 96,000 objects) stops the event
    # loop for 60 ms.
    gc.collect()
    gc.freeze()
    code = 0
    try:
        serve()
    except StartupError as error:
        logging.shutdown()
        print(" ".join(str(error).split()), file=sys.stderr)
        code = STARTUP_ERROR_CODE
    except KeyboardInterrupt:
        code = 130
    except Exception:
        logging.getLogger(__name__).exception("ended by an error")
        logging.shutdown()
        code = 1
    sys.stderr.flush()
    # Threads of gRPC and of the metrics page may outlive the loop; nothing of theirs is worth waiting for.
    os._exit(code)


def stop_event() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event


def create_server(interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> grpc.aio.Server:
    """A server with our options; `ErrorInterceptor` is around the other interceptors."""
    return grpc.aio.server(options=SERVER_OPTIONS, interceptors=[ErrorInterceptor(), *interceptors])


def bind(server: grpc.aio.Server, host: str, port: int, certificates: ServerCertificates | None = None) -> int:
    """Opens the port (0: a free one), for TLS if there are certificates, and returns its number.

    Raises:
        StartupError: it cannot be had.
    """
    address = f"{host}:{port}"
    try:
        if certificates is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, certificates.grpc_credentials())
    except RuntimeError as error:
        raise StartupError(f"gRPC port {host}:{port} cannot be bound: is it in use?") from error
    if port and bound != port:
        raise StartupError(f"gRPC port {host}:{port} cannot be bound: is it in use?")
    return bound


class Health:
    """The standard health service over a server's own services, and reflection beside it.

    A service named LIVE is SERVING for as long as the process answers at all, weights or no weights: who restarts a
    process that hangs asks for that one.
    """

    def __init__(self, server: grpc.aio.Server, services: Sequence[str]) -> None:
        self._services = ("", *services)
        self._servicer = health.aio.HealthServicer()
        self.answer_on(server)
        reflection.enable_server_reflection(
            [*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], server
        )

    def answer_on(self, server: grpc.aio.Server) -> None:
        """Answers health checks on another server too."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set_serving(self, serving: bool) -> None:
        """Sets all services to SERVING or NOT_SERVING; watchers hear of it."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self._servicer.set(service, status)
        await self._servicer.set(LIVE, health_pb2.HealthCheckResponse.SERVING)


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: ServiceError) -> NoReturn:
    """Ends the call with the error's status; the ErrorDetail travels in the trailing metadata."""
    detail = error_to_proto(error).SerializeToString()
    code = grpc.StatusCode[error.code.value]
    try:
        await context.abort(code, error.message[:MAX_ERROR_CHARS], trailing_metadata=((ERROR_KEY, detail),))
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError as over:
        raise asyncio.CancelledError(_CALL_OVER) from over
    raise AssertionError("abort returns never")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns ServiceErrors into statuses, and everything else that escapes into INTERNAL with an id."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the method's handler."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming is None:
            return handler
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        wrapped = _guard_stream(behaviour) if inspect.isasyncgenfunction(behaviour) else _guard(behaviour)
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(wrapped, handler.request_deserializer, handler.response_serializer)


def _guard(behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(request, context)
        except grpc.aio.AbortError:
            raise
        except grpc.aio.BaseError as error:
            raise asyncio.CancelledError(_CALL_OVER) from error
        except ServiceError as error:
            await abort_with(context, error)
        except Exception as error:  # noqa: BLE001 - the one border where a bug becomes a status
            await abort_with(context, internal_error(error))

    return guarded


def _guard_stream(behaviour: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async for response in behaviour(request, context):
                yield response
        except grpc.aio.AbortError:
            raise
        except grpc.aio.BaseError as error:
            raise asyncio.CancelledError(_CALL_OVER) from error
        except ServiceError as error:
            await abort_with(context, error)
        except Exception as error:  # noqa: BLE001 - the one border where a bug becomes a status
            await abort_with(context, internal_error(error))

    return guarded
