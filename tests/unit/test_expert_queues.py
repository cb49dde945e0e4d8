"""Models whose experts lie in denoisers of their own, as a gateway sees them: who claims, and where requests go on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.checkpoints import Checkpoint, Checkpoints
from gateway.config import GatewaySection, RedisSection, StagesSection
from gateway.lifecycle import Lifecycle
from gateway.objects import Folder
from gateway.records import queue_key
from gateway.replica import Place, Replica
from gateway.replicas import Replicas
from gateway.state import State
from gateway.store import Store
from gateway.ticket import Ticket
from gateway.work import Work
from lightloom.cluster_config import load_cluster
from protos import types_pb2
from services.errors import CorruptTensor, NotReady, StartupError

HIGH, LOW = "high_noise", "low_noise"


def replica(stage: str, component: str, expert: str = "") -> Replica:
    found = Replica(stage, f"{component}:1", cast(Any, None))
    found.facts = types_pb2.DescribeResponse(
        component_id=component, models=["m"], max_in_flight=8, expert=expert, experts=[HIGH, LOW] if expert else []
    )
    return found


def cluster(*found: Replica) -> Replicas:
    replicas = Replicas(StagesSection(), lambda: None)
    for one in (replica("text_encoder", "t"), replica("vae", "v"), *found):
        assert one.facts is not None
        replicas.known[one.stage, one.address] = one
        replicas._last[Place(one.stage, "m", one.facts.expert)] = one.facts
    return replicas


high, low, whole = replica("dit", "h", HIGH), replica("dit", "l", LOW), replica("dit", "w")


def test_a_request_begins_where_the_first_expert_is_and_each_has_its_place() -> None:
    both = cluster(low, high)
    assert both.component("dit", "m") == "h"
    assert [both.component("dit", "m", expert) for expert in (HIGH, LOW)] == ["h", "l"]
    assert both.experts("m") == [HIGH, LOW]
    assert {place.expert for place in both.components() if place.stage == "dit"} == {HIGH, LOW}
    assert (both.models()["m"].ready, list(both.models()["m"].missing_experts)) == (True, [])
    assert cluster(whole).experts("m") == []


@pytest.mark.parametrize(("here", "lacks"), [(high, LOW), (low, HIGH)])
def test_what_lacks_is_named_and_new_requests_are_refused(here: Replica, lacks: str) -> None:
    alone = cluster(here)
    info = alone.models()["m"]
    assert (info.ready, list(info.missing_experts)) == (False, [lacks])
    with pytest.raises(NotReady, match=f"'m' has no dit replica with its expert {lacks} now"):
        alone.limits("m")
    assert cluster(here, whole).models()["m"].ready, "a denoiser with all experts takes every step"


def test_nothing_is_claimed_for_an_expert_whose_successor_was_never_here() -> None:
    assert cluster(high).feeds("h") == []
    both = cluster(high, low)
    assert both.feeds("h") is None
    # It is known: what is made waits for it.
    del both.known["dit", low.address]
    assert both.feeds("h") is None
    assert cluster(low).feeds("l") is None
    both.known["text_encoder", "t:1"].others = 8
    assert both.feeds("h") == both.feeds("l") == []


class Gateway:
    """One that owns a request at the high-noise denoiser."""

    def __init__(self, url: str, folder: Path) -> None:
        self.folder = folder
        self.state = State(RedisSection(url=url), "gateway")
        self.store = Store(Folder(folder))
        self.lifecycle = Lifecycle(self.state, cluster(high, low), self.store, GatewaySection(), "gateway")

    async def claim(self, component: str) -> Work:
        claim = await self.state.claim((queue_key("dit", component),), 10.0)
        assert claim is not None
        return Work.of(claim)

    async def hand_on(self, work: Work, replica: Replica, step: int, expert: str) -> dict[str, bytes]:
        """The record after a denoiser's last checkpoint."""
        checkpoints = Checkpoints(self.state, self.store, work, 15.0, 10.0)
        checkpoint = Checkpoint(step, [b"latents"], expert)
        await checkpoints.keep(checkpoint)
        assert checkpoints.onward is checkpoint
        work.add("dit", types_pb2.StageUsage(busy_s=1.5, spans=[types_pb2.Span(name="dit.denoise")]))
        await self.lifecycle._hand_on(work, replica, checkpoints, checkpoint)
        return await self.state.get(work.request_id)

    def files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "latents").iterdir())


@pytest.fixture
async def gateway(url: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    made = Gateway(url, tmp_path)
    await made.state._scripts.redis.flushall()
    params = types_pb2.GenerationParams(model="m", width=64, height=64, num_frames=1).SerializeToString()
    await made.state.submit("r", queue_key("dit", "h"), Ticket(), {"params": params, "traceparent": ""})
    yield made
    await made.state.close()


async def test_it_waits_for_the_next_expert_with_its_checkpoint_and_what_was_spent(gateway: Gateway) -> None:
    record = await gateway.hand_on(await gateway.claim("h"), high, 6, LOW)
    assert (record["state"], record["stage"], record["step"], record["attempt"]) == (b"queued", b"dit", b"6", b"0")
    assert (record["queue"], record["expert"]) == (queue_key("dit", "l").encode(), LOW.encode())
    work = await gateway.claim("l")
    [kept] = work.checkpoints
    assert (kept.step, gateway.files()) == (6, [kept.name])
    assert work.busy_s == {"dit": 1.5} and [span.name for span in work.spans] == ["dit.denoise"]
    resumed = await Checkpoints(gateway.state, gateway.store, work, 15.0, 10.0).newest()
    assert resumed is not None and list(resumed.messages) == [b"latents"]
    # A break gives it back to the same expert, and it goes on from there.
    await gateway.state.requeue("r", work.claim.fence, 3, True, b"e")
    again = await gateway.claim("l")
    assert [one.name for one in again.checkpoints] == [kept.name]
    assert (await gateway.state.get("r"))["step"] == b"6"


async def test_an_abort_at_the_boundary_leaves_nothing(gateway: Gateway) -> None:
    work = await gateway.claim("h")
    await gateway.state.abort("r")
    record = await gateway.hand_on(work, high, 6, LOW)
    assert record["state"] == b"cancelled" and "checkpoints" not in record and not gateway.files()


@pytest.mark.parametrize("expert", ["middle", HIGH])
async def test_a_denoiser_that_hands_on_to_nobody_is_found_out(gateway: Gateway, expert: str) -> None:
    with pytest.raises(CorruptTensor, match=f"'{expert}', which is not there"):
        await gateway.hand_on(await gateway.claim("h"), high, 6, expert)
    assert not gateway.files()


async def test_one_that_loses_its_checkpoint_each_time_does_not_go_to_and_fro_for_ever(gateway: Gateway) -> None:
    for _ in range(2):
        await gateway.hand_on(await gateway.claim("h"), high, 6, LOW)
        record = await gateway.hand_on(await gateway.claim("l"), low, 0, HIGH)
        assert (record["queue"], record["step"]) == (queue_key("dit", "h").encode(), b"0")
    await gateway.hand_on(await gateway.claim("h"), high, 6, LOW)
    with pytest.raises(CorruptTensor, match="checkpoint with which the expert low_noise was to go on is lost"):
        await gateway.hand_on(await gateway.claim("l"), low, 0, HIGH)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("[models.m.replicas]\ndit = 2", "models.m.replicas.dit does not go with models.m.experts"),
        ('[models.m.engine]\nexpert = "low_noise"', "models.m.engine.expert does not go with"),
        ("[models.m.engine]\noffload_experts = true", "models.m.engine.offload_experts does not go with"),
        ("[models.m.experts.middle]\nreplicas = 65", "models.m.experts.middle.replicas is 65"),
        ("[models.m.experts.middle]\nreplica = 1", "unknown config key models.m.experts.middle.replica"),
    ],
)
def test_a_cluster_file_that_contradicts_itself_is_refused(tmp_path: Path, lines: str, says: str) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(f'[models.m]\nsource = "x"\n[models.m.experts.high_noise]\ndevice = "cuda:0"\n{lines}\n')
    with pytest.raises(StartupError, match=says):
        load_cluster(path)
    path.write_text('[models.m]\nsource = "x"\n[models.m.experts.high_noise]\n[models.m.experts.low_noise]\n')
    assert load_cluster(path).models["m"].stages == {
        "text_encoder": 1,
        "dit.high_noise": 1,
        "dit.low_noise": 1,
        "vae": 1,
    }
