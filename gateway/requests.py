"""The life of requests as clients see it: submit, follow, abort, list. Behind both fronts, gRPC and REST."""

from __future__ import annotations

import contextlib
import re
import secrets
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial

from gateway.config import GatewaySection
from gateway.cost import cost_of, megapixel_steps
from gateway.dispatch import Dispatcher
from gateway.followers import StoredEvent
from gateway.keys import ApiKey
from gateway.links import Links, content_path
from gateway.quotas import Quotas
from gateway.records import queue_key
from gateway.replicas import Replicas
from gateway.state import State
from gateway.status import digest_of, record_fields, state_number, status_of, stored_params
from gateway.store import Store
from gateway.ticket import Ticket, batch_key, feed_key
from gateway.withdrawals import Withdrawals
from gateway.work import spans_in
from protos import gateway_pb2, types_pb2
from services.errors import (
    InvalidRequest,
    KeyReused,
    Overloaded,
    StateStoreDown,
    UnknownModel,
    UnknownRequest,
    WrongState,
)
from services.media import check_mask, first_picture
from services.request import (
    MAX_SEED,
    GenerationParams,
    InterpolationLimits,
    Limits,
    ResolvedParams,
    check_interpolation,
    resolve,
)
from services.telemetry import new_traceparent

MAX_LIST, LISTED_AT_ONCE = 1000, 100
# A gRPC message takes 16 MiB: a list of long prompts ends before that.
MAX_LIST_BYTES = 8 * 1024 * 1024
MAX_KEY_CHARS = 128
_NAMES = tuple(GenerationParams.__dataclass_fields__)
_EVENT_ID = re.compile(r"[0-9]{1,19}(-[0-9]{1,19})?")


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the gateway can take requests: Redis takes writes, and which models have all their stages.

    `interpolation`: whether there is somebody who makes frames between frames. `missing_experts`: of models whose
    denoisers hold one each, those that nobody holds.
    """

    redis: bool
    models: dict[str, bool]
    interpolation: bool
    missing_experts: dict[str, list[str]]

    @property
    def ready(self) -> bool:
        """Redis, and one model at least."""
        return self.redis and any(self.models.values())


@dataclass(frozen=True, slots=True)
class Content:
    """An artifact; `read` gives its bytes from one place to another, as Store.read."""

    artifact: gateway_pb2.Artifact
    read: Callable[[int, int], AsyncIterator[bytes]]


class RequestService:
    """All that a front needs. Raises ServiceErrors only."""

    def __init__(
        self,
        state: State,
        dispatcher: Dispatcher,
        replicas: Replicas,
        store: Store,
        links: Links,
        config: GatewaySection,
        weights: Mapping[str, float],
    ) -> None:
        self.links = links
        self._state = state
        self._dispatcher = dispatcher
        self._replicas = replicas
        self._store = store
        self._config = config
        self._weights = weights
        self._quotas = Quotas(state)
        self._withdrawals: Withdrawals[str] = Withdrawals(state.withdraw)
        self._left: Withdrawals[str] = Withdrawals(self._abort_known)

    async def submit(
        self,
        params: GenerationParams,
        key: ApiKey,
        *,
        idempotency_key: str = "",
        priority: int = 0,
        traceparent: str = "",
    ) -> str:
        """Checks and stores a request; from then on it survives this gateway. Returns its id.

        Args:
            key: whose request it is, and whose quotas it is counted against.
            idempotency_key: the tenant's own name for the request; the same request under it is stored once.

        Raises:
            UnknownModel, NotReady: nobody serves the model (now).
            InvalidRequest: a value is outside the model's limits, or it has no previews and they are asked for.
            NotEnabled: frames are to be interpolated, and nobody can.
            Overloaded: the queue is full, or has too many of the tenant's requests.
            ArtifactStoreFull, ArtifactStoreDown: nobody could keep what it makes.
            KeyReused: another request has that idempotency key.
            QuotaExceeded: the key has used up its quota.
        """
        if refusal := self._store.writes.refusal:
            raise refusal
        model = self.model_of(params.model)
        params = GenerationParams(**{name: getattr(params, name) for name in _NAMES} | {"model": model})
        resolved, limits = self._resolve(params)
        request_id = _new_id(key.tenant, idempotency_key)
        body = digest_of(params, priority)
        if idempotency_key and await self._repeats(request_id, body):
            return request_id
        queue = queue_key("dit", self._replicas.component("dit", model))
        stored, inputs = stored_params(resolved)
        fields = record_fields(resolved, stored) | {"body": body, "traceparent": new_traceparent(traceparent)}
        ticket = self._ticket(resolved, limits, priority, key.tenant, len(stored) + len(inputs))
        charge = megapixel_steps(resolved)
        # Last: what is refused above costs nothing.
        await self._quotas.take(key, charge)
        try:
            accepted = await self._dispatcher.submit(request_id, queue, ticket, fields, inputs)
        except Overloaded:
            await self._quotas.give_back(key, charge)
            raise
        except BaseException:
            # It may be stored all the same. Nobody waits for it then, unless the key brings its owner back.
            if not idempotency_key:
                self._withdrawals.add(request_id)
            raise
        if not accepted:
            await self._quotas.give_back(key, charge)
            await self._repeats(request_id, body)
        return request_id

    def _resolve(self, params: GenerationParams) -> tuple[ResolvedParams, Limits]:
        limits = self._replicas.limits(params.model)
        picture = first_picture(params.inputs[: limits.most_inputs])
        self._check_mask_is_taken(params, limits)
        resolved = resolve(params, limits, seed=secrets.randbelow(MAX_SEED), picture=picture)
        check_mask(resolved.inputs, limits)
        if resolved.preview_every:
            self._check_previews(params.model)
        if resolved.enable_frame_interpolation:
            check_interpolation(resolved, self.interpolation_limits())
        return resolved, limits

    def _ticket(self, params: ResolvedParams, limits: Limits, priority: int, tenant: str, nbytes: int) -> Ticket:
        config = self._config
        return Ticket(
            priority=priority,
            tenant=tenant,
            weight=self._weights.get(tenant, 1.0),
            cost=cost_of(params, limits),
            nbytes=nbytes,
            batch=batch_key(params, limits),
            feed=feed_key(
                params.model, with_inputs=bool(params.inputs), interpolated=params.enable_frame_interpolation
            ),
            timeout_s=config.request_timeout_s,
            keep_s=config.keep_s,
            age_s=config.age_s,
            max_queued=config.max_queued,
            max_queued_tenant=config.max_queued_tenant,
            max_queued_cost=config.max_queued_cost,
            max_queued_bytes=config.max_queued_bytes,
        )

    async def _repeats(self, request_id: str, body: str) -> bool:
        """Whether a request of that id is stored, with that body."""
        record = await self._state.get(request_id)
        if record and record.get("body", b"").decode() != body:
            raise KeyReused(
                f"this idempotency key belongs to request {request_id}, which has another body or priority: send the "
                "same again, or choose a new key",
                param="idempotency_key",
                request_id=request_id,
            )
        return bool(record)

    def _check_mask_is_taken(self, params: GenerationParams, limits: Limits) -> None:
        if "mask" in limits.other_roles or all(media.role != "mask" for media in params.inputs):
            return
        taking = [info.name for info in self.models() if "mask" in info.limits.optional_roles]
        others = f"these do: {', '.join(taking)}" if taking else "nor does any other that is served"
        raise InvalidRequest(f"model {params.model!r} takes no mask; {others}", param="mask")

    def _check_previews(self, model: str) -> None:
        if self._replicas.fit(model) is None:
            raise InvalidRequest(
                f"model {model!r} makes no previews: its VAE cannot encode pictures, so nobody knows what its latents "
                "look like; ask without preview_every (partial_images in the images call)",
                param="preview_every",
            )

    def model_of(self, name: str) -> str:
        """The name itself, or the only model there is for an empty one.

        Raises:
            UnknownModel: there is not exactly one.
        """
        if name:
            return name
        models = sorted(self._replicas.models())
        if len(models) != 1:
            raise UnknownModel(f"name a model: there are {', '.join(models) or 'none now'}", param="model")
        return models[0]

    async def get(self, request_id: str) -> gateway_pb2.RequestStatus:
        """State, progress, parameters and result.

        Raises:
            UnknownRequest: no request has that id, or it has been forgotten.
        """
        return await self._status(request_id, await self._record(request_id))

    async def _status(self, request_id: str, record: dict[str, bytes]) -> gateway_pb2.RequestStatus:
        status = status_of(request_id, record)
        if status.HasField("artifact"):
            status.artifact.url = await self.links.link(content_path(request_id))
        return status

    async def _record(self, request_id: str) -> dict[str, bytes]:
        record = await self._state.get(request_id)
        if not record:
            raise UnknownRequest(f"there is no request {request_id!r}", param="request_id")
        return record

    async def tenant_of(self, request_id: str) -> str | None:
        """Whose request it is; None for an unknown one."""
        return await self._state.tenant_of(request_id)

    async def newest(self, limit: int, tenant: str | None = None) -> list[gateway_pb2.RequestStatus]:
        """The newest requests of one tenant, or of all; at most 1000, and no more than MAX_LIST_BYTES."""
        statuses: list[gateway_pb2.RequestStatus] = []
        ids = await self._state.following("", min(limit or 100, MAX_LIST), tenant, oldest_first=False)
        left_bytes = MAX_LIST_BYTES
        for start in range(0, len(ids), LISTED_AT_ONCE):
            some = ids[start : start + LISTED_AT_ONCE]
            for request_id, record in zip(some, await self._state.records(some), strict=True):
                if not record:
                    continue
                status = await self._status(request_id, record)
                left_bytes -= status.ByteSize()
                if left_bytes < 0:
                    return statuses
                statuses.append(status)
        return statuses

    async def walk(
        self, tenant: str | None, *, after: str, oldest_first: bool
    ) -> AsyncIterator[tuple[str, gateway_pb2.RequestStatus | None]]:
        """All requests of one tenant, or of all, or those after one. Records are read as they are taken.

        Ids may be known for longer than their requests, which are None then.

        Raises:
            UnknownRequest: there is no such id as `after`, or no longer.
        """
        ids = await self._state.following(after, LISTED_AT_ONCE, tenant, oldest_first=oldest_first)
        while ids:
            for request_id, record in zip(ids, await self._state.records(ids), strict=True):
                yield request_id, await self._status(request_id, record) if record else None
            try:
                ids = await self._state.following(ids[-1], LISTED_AT_ONCE, tenant, oldest_first=oldest_first)
            except UnknownRequest:
                # The oldest ids go first: those that are left are all newer.
                ids = []
                if oldest_first:
                    ids = await self._state.following("", LISTED_AT_ONCE, tenant, oldest_first=True)

    async def abort(self, request_id: str, tenant: str = "") -> gateway_pb2.RequestState:
        """Cancels a request of a tenant, or of any (""); one that has ended stays as it is. Returns the state.

        Raises:
            UnknownRequest: as `get`, or it is another tenant's.
        """
        state = await self._state.abort(request_id, tenant)
        if state is None:
            raise UnknownRequest(f"there is no request {request_id!r}", param="request_id")
        if state == "cancelled":
            self._dispatcher.forget(request_id)
        return state_number(state)

    async def leave(self, request_id: str) -> None:
        """Aborts for a caller that has gone; where Redis is away, as soon as it answers."""
        try:
            await self._abort_known(request_id)
        except StateStoreDown:
            self._left.add(request_id)

    async def _abort_known(self, request_id: str) -> None:
        with contextlib.suppress(UnknownRequest):
            await self.abort(request_id)

    def events(self, request_id: str, last_event_id: str = "") -> AsyncIterator[gateway_pb2.GenerateResponse]:
        """Events after `last_event_id`, until the request has ended; a status comes with the whole record.

        Raises:
            UnknownRequest: as `get`, with the first event.
            InvalidRequest: at once, when the event id is not one of ours.
        """
        if last_event_id and not _EVENT_ID.fullmatch(last_event_id):
            raise InvalidRequest(f"last_event_id {last_event_id[:40]!r} is not one of ours", param="last_event_id")
        return self._events(request_id, last_event_id or "0")

    async def _events(self, request_id: str, after: str) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        async for event in self._state.events(request_id, after):
            yield await self._response(request_id, event)

    async def _response(self, request_id: str, event: StoredEvent) -> gateway_pb2.GenerateResponse:
        response = gateway_pb2.GenerateResponse(event_id=event.event_id, request_id=request_id)
        if event.kind == "step":
            response.step.ParseFromString(event.payload)
        elif event.kind == "preview":
            response.preview.ParseFromString(event.payload)
        else:
            response.status.CopyFrom(await self._status(request_id, event.record))
            # The record may have moved on since the event.
            response.status.state = state_number(event.state)
        return response

    async def content(self, request_id: str) -> Content:
        """A finished request's media, to read.

        Raises:
            UnknownRequest: as `get`.
            WrongState: it has none (yet).
        """
        record = await self._record(request_id)
        status = status_of(request_id, record)
        if not status.HasField("artifact"):
            name = gateway_pb2.RequestState.Name(status.state).removeprefix("REQUEST_STATE_").lower()
            raise WrongState(f"request {request_id} is {name} and has no artifact", request_id=request_id)
        return Content(status.artifact, partial(self._store.read, record["file"].decode(), status.artifact))

    async def media(self, status: gateway_pb2.RequestStatus) -> AsyncIterator[bytes]:
        """All bytes of what a request has just made, in pieces.

        Raises:
            UnknownRequest, WrongState: as `content`.
            ServiceError: as Store.read.
        """
        recent = self._store.recent(status.artifact)
        if recent is not None:
            yield recent
            return
        content = await self.content(status.request_id)
        async for piece in content.read(0, content.artifact.nbytes):
            yield piece

    async def trace(self, request_id: str) -> list[types_pb2.Span]:
        """The request's timeline over all processes, by start.

        Raises:
            UnknownRequest: as `get`.
        """
        record = await self._record(request_id)
        return sorted(spans_in(record), key=lambda span: span.start_unix_ns)

    def models(self) -> list[gateway_pb2.ModelInfo]:
        """Every model, with its limits and replicas."""
        return [info for _, info in sorted(self._replicas.models().items())]

    def interpolation_limits(self) -> InterpolationLimits:
        """What interpolation accepts.

        Raises:
            NotEnabled: there has been no service for it.
        """
        return self._replicas.interpolation_limits()

    def model(self, name: str) -> gateway_pb2.ModelInfo:
        """One of them.

        Raises:
            UnknownModel: no replica names it.
        """
        return self._replicas.model(name)

    async def health(self) -> Health:
        """For probes and the launcher."""
        infos = self.models()
        return Health(
            redis=await self._state.writable(),
            models={info.name: info.ready for info in infos},
            interpolation=bool(self._replicas.of_stage("interpolation")),
            missing_experts={info.name: list(info.missing_experts) for info in infos if info.missing_experts},
        )


def _new_id(tenant: str, idempotency_key: str) -> str:
    if len(idempotency_key) > MAX_KEY_CHARS:
        raise InvalidRequest(f"idempotency_key has more than {MAX_KEY_CHARS} characters", param="idempotency_key")
    # A tenant's name has no slash, so no two tenants share an id.
    name = f"lightloom/{tenant}/{idempotency_key}"
    return uuid.uuid5(uuid.NAMESPACE_URL, name).hex if idempotency_key else uuid.uuid4().hex
