"""Who may call what: the door that reads API keys, and the requests as one caller may use them.

Both fronts open the door with the caller's `authorization` and work with what they get. Without a keys file, the
gateway serves whoever reaches it, which is why it then binds loopback only.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.config import GatewayConfig
from gateway.image_fetch import ImageFetcher
from gateway.keys import SCOPES, ApiKey, KeyFile
from gateway.request_log import RequestLog
from gateway.requests import Content, RequestService
from protos import gateway_pb2, types_pb2
from services.errors import PermissionDenied, ServiceError, StartupError, Unauthenticated, UnknownRequest
from services.request import GenerationParams, InterpolationLimits, Media

ANONYMOUS = ApiKey(id="", name="anonymous", tenant="anonymous", scopes=SCOPES, sha256="")
HOW = "send Authorization: Bearer KEY (gRPC: metadata `authorization`)"


@dataclass(frozen=True, slots=True)
class Door:
    """Opens the requests to a caller. Without `keys`, everybody is let in as `anonymous`, with every scope."""

    service: RequestService
    keys: KeyFile | None
    fetcher: ImageFetcher
    log: RequestLog

    def open(self, authorization: str) -> CallerRequests:
        """The requests as the caller may use them.

        Raises:
            Unauthenticated: no key, or an unknown one.
        """
        if self.keys is None:
            return CallerRequests(self, ANONYMOUS)
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            raise Unauthenticated(f"an API key is needed: {HOW}")
        key = self.keys.find(text.strip())
        if key is None:
            raise Unauthenticated("the API key is unknown or has been revoked")
        return CallerRequests(self, key)


class CallerRequests:
    """A RequestService behind a key's scopes, for one call.

    A key sees its own tenant's requests; others' do not exist for it, unless it may `read_all`. What a call submits
    itself it may also follow and abort.
    """

    def __init__(self, door: Door, key: ApiKey) -> None:
        self._service = door.service
        self._fetcher = door.fetcher
        self._log = door.log
        self._key = key
        self._submitted: set[str] = set()

    @contextlib.contextmanager
    def refusals(self, model: str) -> Iterator[None]:
        """Inside, a request for this model is made ready and submitted: what refuses it is noted."""
        try:
            yield
        except ServiceError as error:
            served = model if any(info.name == model for info in self.models()) else ""
            self._log.refused(error, served, self._key.tenant)
            raise

    async def submit(
        self, params: GenerationParams, *, idempotency_key: str = "", priority: int = 0, traceparent: str = ""
    ) -> str:
        """As RequestService.submit, for the key's tenant and against its quotas."""
        self._need("generate")
        request_id = await self._service.submit(
            params, self._key, idempotency_key=idempotency_key, priority=priority, traceparent=traceparent
        )
        self._submitted.add(request_id)
        return request_id

    async def fetch(self, urls: Sequence[tuple[str, str]]) -> dict[str, Media]:
        """As ImageFetcher.fetch, for who may use the pictures."""
        self._need("generate")
        return await self._fetcher.fetch(urls)

    def model_of(self, name: str) -> str:
        """As RequestService.model_of."""
        return self._service.model_of(name)

    def models(self) -> list[gateway_pb2.ModelInfo]:
        """As RequestService.models."""
        return self._service.models()

    def interpolation_limits(self) -> InterpolationLimits:
        """As RequestService.interpolation_limits."""
        return self._service.interpolation_limits()

    def model(self, name: str) -> gateway_pb2.ModelInfo:
        """As RequestService.model."""
        return self._service.model(name)

    async def get(self, request_id: str) -> gateway_pb2.RequestStatus:
        """As RequestService.get."""
        await self._check(request_id)
        return await self._service.get(request_id)

    async def newest(self, limit: int) -> list[gateway_pb2.RequestStatus]:
        """The newest requests: the tenant's own, or everybody's for a key that may `read_all`."""
        self._need("read")
        return await self._service.newest(limit, None if self._sees_all else self._key.tenant)

    def walk(self, *, after: str, oldest_first: bool) -> AsyncIterator[tuple[str, gateway_pb2.RequestStatus | None]]:
        """As RequestService.walk, of the requests that `newest` tells of."""
        self._need("read")
        tenant = None if self._sees_all else self._key.tenant
        return self._service.walk(tenant, after=after, oldest_first=oldest_first)

    async def abort(self, request_id: str) -> gateway_pb2.RequestState:
        """As RequestService.abort."""
        if request_id in self._submitted:
            return await self._service.abort(request_id)
        self._need("abort")
        # Redis compares the tenants itself: an abort has no time for a second question.
        return await self._service.abort(request_id, "" if self._sees_all else self._key.tenant)

    async def leave(self, request_id: str) -> None:
        """As RequestService.leave, of what this call has submitted."""
        await self._service.leave(request_id)

    def events(self, request_id: str, last_event_id: str = "") -> AsyncIterator[gateway_pb2.GenerateResponse]:
        """As RequestService.events."""
        return self._events(request_id, self._service.events(request_id, last_event_id))

    async def _events(
        self, request_id: str, events: AsyncIterator[gateway_pb2.GenerateResponse]
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        await self._check(request_id)
        async for event in events:
            yield event

    async def content(self, request_id: str) -> Content:
        """As RequestService.content."""
        await self._check(request_id)
        return await self._service.content(request_id)

    def media(self, status: gateway_pb2.RequestStatus) -> AsyncIterator[bytes]:
        """As RequestService.media, of a status that came from here."""
        return self._service.media(status)

    async def trace(self, request_id: str) -> list[types_pb2.Span]:
        """As RequestService.trace."""
        await self._check(request_id)
        return await self._service.trace(request_id)

    @property
    def _sees_all(self) -> bool:
        return "read_all" in self._key.scopes

    def _need(self, scope: str) -> None:
        if scope in self._key.scopes or (scope == "read" and self._sees_all):
            return
        raise PermissionDenied(
            f"key {self._key.name!r} lacks the scope {scope!r}: it has {', '.join(self._key.scopes)}"
        )

    async def _check(self, request_id: str) -> None:
        """Whether it may be read."""
        if request_id in self._submitted:
            return
        self._need("read")
        if not self._sees_all and await self._service.tenant_of(request_id) != self._key.tenant:
            raise UnknownRequest(f"there is no request {request_id!r}", param="request_id")


def open_keys(config: GatewayConfig) -> KeyFile | None:
    """The keys of a gateway, if it has any.

    Raises:
        StartupError: the file cannot be read, or there is none and others than this machine could call.
    """
    access, host = config.access, config.gateway.host
    if access.keys_file:
        return KeyFile(Path(access.keys_file))
    if access.allow_anonymous or _is_loopback(host):
        return None
    raise StartupError(
        f"gateway.host {host} can be reached from other machines, and there are no API keys: make one with "
        "`lightloom key create` and set access.keys_file; or bind 127.0.0.1; or, if all who can reach it may use it, "
        "set access.allow_anonymous = true"
    )


def _is_loopback(host: str) -> bool:
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        # Binding will fail too, and say why.
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)
