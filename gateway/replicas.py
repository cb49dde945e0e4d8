"""The replicas of every stage: found in lists, asked what they are, and how much each has from this gateway."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from gateway.addresses import addresses_of
from gateway.config import StagesSection
from gateway.experts import following, missing, takes
from gateway.replica import STAGES, Place, Replica, replica_proto
from gateway.ticket import feed_key
from protos import (
    dit_pb2,
    dit_pb2_grpc,
    gateway_pb2,
    interpolation_pb2_grpc,
    text_encoder_pb2_grpc,
    types_pb2,
    vae_pb2_grpc,
)
from services.client import connect, error_from_rpc
from services.config import TlsSection
from services.errors import NotEnabled, NotReady, ServiceError, StartupError, UnknownModel
from services.files import Stamp
from services.request import InterpolationLimits, Limits
from services.tls import stamps
from services.wire import interpolation_limits_from_proto, limits_from_proto

log = logging.getLogger(__name__)

POLL_S = 1.0
FAST_POLL_S = 0.1
DESCRIBE_TIMEOUT_S = 3.0
# How long calls on a channel may still take: of a replica that left, and after a change of certificates.
LEAVE_S = 60.0
RENEW_S = 3600.0
# What every model needs.
MODEL_STAGES = ("text_encoder", "dit", "vae")
_STUBS: dict[str, Any] = {
    "text_encoder": text_encoder_pb2_grpc.TextEncoderStub,
    "dit": dit_pb2_grpc.DitStub,
    "vae": vae_pb2_grpc.VaeStub,
    "interpolation": interpolation_pb2_grpc.InterpolationStub,
}


@dataclass(slots=True)
class Replicas:
    """All replicas of all stages, kept fresh by `watch`."""

    config: StagesSection
    on_change: Callable[[], None]
    tls: TlsSection = field(default_factory=TlsSection)
    known: dict[tuple[str, str], Replica] = field(default_factory=dict)
    _tls_stamps: tuple[Stamp, ...] = ()
    # What the newest replica of a place said: it holds when all of them are away for a moment.
    _last: dict[Place, types_pb2.DescribeResponse] = field(default_factory=dict)
    _unresolved: set[str] = field(default_factory=set)

    def of_stage(self, stage: str) -> list[Replica]:
        """Healthy replicas of a stage, the least busy first."""
        replicas = [r for r in self.known.values() if r.stage == stage and r.healthy]
        return sorted(replicas, key=lambda replica: replica.ours + replica.others)

    def choose(self, stage: str, model: str) -> Replica:
        """The least busy replica with a credit.

        Raises:
            NotReady: there is none now.
        """
        replica = self._with_credit(stage, model)
        if replica is None:
            raise NotReady(f"no {stage} replica is free for model {model!r}", retry_after_s=1.0)
        return replica

    def _with_credit(self, stage: str, model: str) -> Replica | None:
        return next((r for r in self.of_stage(stage) if r.serves(model) and r.has_credit), None)

    def feeds(self, component_id: str) -> list[str] | None:
        """What requests of a DiT component may need of other stages and can have now, as feed keys; None for all."""
        served, held = [], False
        for (stage, model, _), facts in self._last.items():
            if stage != "dit" or facts.component_id != component_id:
                continue
            # Where latents go must be known, too, though not free yet.
            onward = [self.last_facts("dit", model, expert) for expert in following(facts)]
            onward.append(self.last_facts("vae", model))
            text = self._with_credit("text_encoder", model) is not None and None not in onward
            vae = text and self._with_credit("vae", model) is not None
            wanted = {False: text, True: vae} if facts.limits.max_inputs else {False: text}
            served += [
                feed_key(model, with_inputs=inputs, interpolated=interpolated)
                for inputs, free in wanted.items()
                for interpolated in (False, True)
                if free
            ]
            held = held or not all(wanted.values())
        return served if held else None

    def feeds_of_vae(self, component_id: str) -> list[str] | None:
        """What requests of a VAE component can have now: without a free interpolator, those that need none."""
        if self._with_credit("interpolation", "") is not None:
            return None
        models = [place.model for place, facts in self._last.items() if facts.component_id == component_id]
        return [feed_key(model, with_inputs=inputs) for model in models for inputs in (False, True)]

    def interpolation_limits(self) -> InterpolationLimits:
        """What interpolation accepts, as its replicas say; the last ones that were here.

        Raises:
            NotEnabled: there has been none.
        """
        facts = self.last_facts("interpolation", "")
        if facts is None:
            raise NotEnabled(
                "there is no interpolation service here: ask without enable_frame_interpolation",
                param="enable_frame_interpolation",
            )
        return interpolation_limits_from_proto(facts.interpolation_limits)

    def component(self, stage: str, model: str, expert: str = "") -> str:
        """The component id of a model's stage; the last known one when no replica is here now.

        Args:
            expert: of a denoiser: the one that takes the next step; "" for the first.

        Raises:
            UnknownModel: no replica names the model.
            NotReady: the model is known, but that stage has not been here yet.
        """
        facts = self.last_facts(stage, model, expert)
        if facts is None:
            raise self._absent(stage, model, expert)
        return facts.component_id

    def components(self) -> dict[Place, str]:
        """The component id of every place; the last known one of those that are away."""
        return {place: facts.component_id for place, facts in self._last.items()}

    def experts(self, model: str) -> list[str]:
        """In the order of their steps, where denoisers hold one each or have done so."""
        known = (facts.experts for place, facts in self._last.items() if place.model == model and facts.expert)
        return list(next(known, []))

    def missing_experts(self, model: str) -> list[str]:
        """Those that no denoiser holds now, though one of the model is here."""
        held = [replica.facts for replica in self.of_stage("dit") if replica.facts and replica.serves(model)]
        return missing(held)

    async def release(self, replica_id: str, request_id: str, fence: int) -> None:
        """Tells a denoiser that the owners of a request with older fences have lost it. One that does not answer finds
        out by itself.
        """
        context = types_pb2.RequestContext(request_id=request_id, fence=fence)
        for replica in self.of_stage("dit"):
            if replica.facts is not None and replica.facts.replica_id == replica_id:
                try:
                    stub = dit_pb2_grpc.DitStub(replica.channel)
                    await stub.Release(dit_pb2.ReleaseRequest(context=context), timeout=DESCRIBE_TIMEOUT_S)
                except grpc.aio.AioRpcError as error:
                    log.info("%s keeps %s for now: %s", replica.address, request_id, error_from_rpc(error).message)
                except grpc.aio.UsageError:
                    log.info("%s has left with %s", replica.address, request_id)

    def paces(self) -> dict[tuple[str, str], float]:
        """Seconds for a unit of work, by stage and component: the mean over replicas that have worked."""
        found: dict[tuple[str, str], list[float]] = {}
        for replica in self.known.values():
            if replica.facts is not None and replica.pace.unit_s is not None:
                found.setdefault((replica.stage, replica.facts.component_id), []).append(replica.pace.unit_s)
        return {component: sum(paces) / len(paces) for component, paces in found.items()}

    def limits(self, model: str) -> Limits:
        """What a model allows, as its DiT replicas say.

        Raises:
            UnknownModel: no replica names the model.
            NotReady: the model is known, but no DiT replica is here now, or none with one of its experts.
        """
        lacking = self.missing_experts(model)
        facts = self._facts("dit", model)
        if lacking or facts is None:
            raise self._absent("dit", model, *lacking[:1])
        return limits_from_proto(facts.limits)

    def fit(self, model: str) -> types_pb2.LatentRgbFit | None:
        """The preview fit that the model's VAE announced; None when it makes none possible.

        Raises:
            UnknownModel, NotReady: as `component`.
        """
        facts = self.last_facts("vae", model)
        if facts is None:
            raise self._absent("vae", model)
        return facts.latent_rgb_fit if facts.HasField("latent_rgb_fit") else None

    def last_facts(self, stage: str, model: str, expert: str = "") -> types_pb2.DescribeResponse | None:
        """What serves a model's stage now, or else did so last; None when nobody has yet.

        Args:
            expert: as of `component`.
        """
        last = (facts for place, facts in self._last.items() if place[:2] == (stage, model))
        return self._facts(stage, model, expert) or next((f for f in last if takes(f, expert)), None)

    def _facts(self, stage: str, model: str, expert: str = "") -> types_pb2.DescribeResponse | None:
        for replica in self.of_stage(stage):
            if replica.facts is not None and replica.serves(model) and takes(replica.facts, expert):
                return replica.facts
        return None

    def _absent(self, stage: str, model: str, expert: str = "") -> ServiceError:
        try:
            self.model(model)
        except UnknownModel as unknown:
            return unknown
        holding = f" with its expert {expert}" if expert else ""
        return NotReady(f"model {model!r} has no {stage} replica{holding} now", retry_after_s=2.0)

    def model(self, name: str) -> gateway_pb2.ModelInfo:
        """One of `models`.

        Raises:
            UnknownModel: no replica names it.
        """
        models = self.models()
        if name not in models:
            raise UnknownModel(f"unknown model {name!r}: there are {', '.join(sorted(models)) or 'none now'}")
        return models[name]

    def models(self) -> dict[str, gateway_pb2.ModelInfo]:
        """Every model that a replica names; ready when each stage is there."""
        models: dict[str, gateway_pb2.ModelInfo] = {}
        stages: dict[str, set[str]] = {}
        for replica in self.known.values():
            if replica.facts is None:
                continue
            for name in replica.facts.models:
                info = models.setdefault(name, gateway_pb2.ModelInfo(name=name))
                info.family = replica.facts.family
                if not info.variants:
                    info.variants.extend(replica.facts.variants)
                if replica.stage == "dit":
                    info.limits.CopyFrom(replica.facts.limits)
                info.replicas.append(replica_proto(replica, replica.facts))
                if replica.healthy:
                    stages.setdefault(name, set()).add(replica.stage)
        for name, info in models.items():
            info.missing_experts.extend(self.missing_experts(name))
            info.ready = stages.get(name, set()) >= set(MODEL_STAGES) and not info.missing_experts
        return models

    async def watch(self) -> None:
        """Follows the lists and asks every replica, for ever."""
        self._tls_stamps = stamps(self.tls)
        while True:
            self._follow_certificates()
            for stage in STAGES:
                await self._follow_list(stage, getattr(self.config, stage))
            await asyncio.gather(*(self._ask(replica) for replica in list(self.known.values())))
            starting = any(replica.facts is None for replica in self.known.values())
            await asyncio.sleep(FAST_POLL_S if starting or not self.known else POLL_S)

    def _follow_certificates(self) -> None:
        """Opens every channel anew when our certificate has changed: a channel keeps the one that it was made with."""
        now = stamps(self.tls)
        if now == self._tls_stamps:
            return
        self._tls_stamps = now
        try:
            for replica in self.known.values():
                replica.channel, old = connect(replica.address, tls=self.tls), replica.channel
                asyncio.ensure_future(old.close(grace=RENEW_S))
        except StartupError as error:
            log.error("the connections to stages stay as they were: %s", error)

    async def _follow_list(self, stage: str, target: str) -> None:
        try:
            addresses = await addresses_of(target)
        except OSError as error:
            # A name without replicas does not exist, and may not for hours.
            if target not in self._unresolved:
                log.warning("cannot resolve %s: %s", target, error)
            self._unresolved.add(target)
            return
        self._unresolved.discard(target)
        for address in addresses:
            if (stage, address) not in self.known:
                try:
                    self.known[stage, address] = Replica(stage, address, connect(address, tls=self.tls))
                except StartupError as error:
                    log.error("cannot connect to %s: %s", address, error)
        for key, replica in list(self.known.items()):
            if replica.stage == stage and replica.address not in addresses:
                del self.known[key]
                # Requests that run there end by themselves; the channel closes once they have.
                asyncio.ensure_future(replica.channel.close(grace=LEAVE_S))

    async def _ask(self, replica: Replica) -> None:
        before, credit, ours = replica.healthy, replica.has_credit, replica.ours
        try:
            facts = await _STUBS[replica.stage](replica.channel).Describe(
                types_pb2.DescribeRequest(), timeout=DESCRIBE_TIMEOUT_S
            )
            replica.silent_because = ""
        except grpc.aio.AioRpcError as error:
            replica.facts = None
            reason = error_from_rpc(error).message
            # Once, not with every question.
            if reason != replica.silent_because:
                log.warning("%s replica %s: %s", replica.stage, replica.address, reason)
            replica.silent_because = reason
        else:
            replica.told(facts, ours)
            self._last |= {Place(replica.stage, model, facts.expert): facts for model in facts.models or ("",)}
        if replica.healthy and not before:
            log.info("%s replica %s joined", replica.stage, replica.address)
        if replica.has_credit and not credit:
            self.on_change()
