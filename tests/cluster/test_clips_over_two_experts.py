"""A tiny Wan model whose experts lie in denoisers of their own: requests go over both, and lose nothing on the way."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import redis

from lightloom.client import Client
from lightloom.local import Local
from protos import gateway_pb2, types_pb2
from services.errors import NotReady, StartupError
from services.families import load_family
from tests.cluster.running import RunningCluster, serving, wait_for

PROMPT = "a red circle moves to the left"
# With a boundary at 0.875 and a shift of 12, the high-noise expert takes about 63 % of the steps.
STEPS = 40
WISH = {"width": 64, "height": 64, "num_frames": 5, "steps": STEPS, "output_format": "raw", "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    load_family("wan").tiny(folder, "t2v", 0)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> dict[str, object]:
    return {"source": str(folder), "engine": {"max_batch": 1}}


@pytest.fixture(scope="module")
def resident(folder) -> bytes:
    """The clip with both experts in one place."""
    with Local(str(folder), max_batch=1) as whole:
        return whole.generate(PROMPT, **WISH).data


@pytest.fixture(scope="module")
def running(model, tmp_path_factory, monkeypatch_session) -> Iterator[RunningCluster]:
    experts = {"high_noise": {}, "low_noise": {}}
    with serving(tmp_path_factory.mktemp("cluster"), {"models": {"clips": {**model, "experts": experts}}}) as running:
        yield running


@pytest.fixture
def client(running):
    with Client(running.cluster.grpc_address) as client:
        yield client
    wait_for(lambda: not running.leftovers(), 20)


def name(running: RunningCluster, expert: str) -> str:
    """The denoiser with that expert."""
    [found] = running.names(f"dit-clips-{expert}")
    return found


def steps(running: RunningCluster, expert: str) -> float:
    """Made by the denoiser since its rank began; it says nothing before its first request."""
    return running.figures(name(running, expert)).get("rank_dit_steps_total", 0.0)


def state(client: Client, request_id: str) -> str:
    return gateway_pb2.RequestState.Name(client.get(request_id).state).removeprefix("REQUEST_STATE_").lower()


def content(running: RunningCluster, request_id: str) -> bytes:
    return httpx.get(f"{running.base_url}/v1/requests/{request_id}/content").content


def events(running: RunningCluster, request_id: str) -> list[tuple[str, dict]]:
    """What a request's followers were told: kind and data."""
    blocks = httpx.get(f"{running.base_url}/v1/requests/{request_id}/events").text.split("\n\n")
    lines = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks if block]
    return [(event["event"], json.loads(event["data"])) for event in lines]


@contextlib.contextmanager
def frozen(running: RunningCluster, expert: str) -> Iterator[None]:
    """The rank of an expert stands still meanwhile."""
    rank = running.rank(name(running, expert))
    rank.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            rank.send_signal(signal.SIGCONT)


def waits_at(running: RunningCluster, expert: str) -> None:
    """Returns when the denoiser has a request."""
    wait_for(lambda: running.figures(name(running, expert))["in_flight"] == 1, 30)


def test_a_request_over_both_equals_one_place_and_tells_the_truth_all_the_way(running, client, resident):
    before = {expert: steps(running, expert) for expert in ("high_noise", "low_noise")}
    made = client.generate(PROMPT, preview_every=1, **WISH)
    assert made.data == resident
    half = {expert: steps(running, expert) - count for expert, count in before.items()}
    assert sum(half.values()) == STEPS and all(half.values())
    told = events(running, made.request_id)
    made_steps = [data["step"] for kind, data in told if kind == "step"]
    assert made_steps == sorted(set(made_steps)) and made_steps[-1] == STEPS
    assert {data["total"] for kind, data in told if kind == "step"} == {STEPS}
    # Queued, running; queued at the boundary, running; running in the VAE, done.
    states = [(data["state"], data["stage"]) for kind, data in told if kind == "status"]
    assert [state for state, _ in states] == ["queued", "running", "queued", "running", "running", "done"]
    boundary = next(place for place, (kind, data) in enumerate(told) if kind == "status" and place > 1)
    for part in (told[:boundary], told[boundary:]):
        assert any(kind == "preview" for kind, _ in part)
    assert client.get(made.request_id).attempt <= 1
    spans = sorted(client.trace(made.request_id), key=lambda span: span.start_unix_ns)
    halves = [span for span in spans if span.name == "dit.denoise"]
    assert [span.process for span in halves] == [name(running, expert) for expert in ("high_noise", "low_noise")]
    assert halves[0].start_unix_ns + halves[0].duration_ns <= halves[1].start_unix_ns
    assert len([span for span in spans if span.name == "gateway.denoise"]) == 2
    assert 0 < made.busy_s["dit"] <= sum(span.duration_ns for span in halves) / 1e9


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_an_abort_in_either_half(running, client, expert):
    with frozen(running, expert):
        request_id = client.submit(PROMPT, **WISH)
        waits_at(running, expert)
        assert client.abort(request_id) in ("cancelling", "cancelled")
        wait_for(lambda: state(client, request_id) == "cancelled", 10)
    wait_for(lambda: not running.figures(name(running, expert))["in_flight"], 20)


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_a_dead_replica_of_either_costs_no_step_of_the_other(running, client, resident, expert):
    before = {one: steps(running, one) for one in ("high_noise", "low_noise")}
    other = next(one for one in before if one != expert)
    with frozen(running, expert):
        request_id = client.submit(PROMPT, **WISH)
        waits_at(running, expert)
        running.rank(name(running, expert)).send_signal(signal.SIGKILL)
    wait_for(lambda: state(client, request_id) == "done", 90)
    assert content(running, request_id) == resident
    assert client.get(request_id).attempt <= 2
    # A new rank counts from 0.
    assert 0 < steps(running, expert) == STEPS - (steps(running, other) - before[other])


def test_without_one_of_them_new_requests_are_refused_and_accepted_ones_wait(running, client, resident):
    before = steps(running, "high_noise")
    with frozen(running, "high_noise"):
        waiting, damaged, aborted = (client.submit(PROMPT, **WISH) for _ in range(3))
        wait_for(lambda: state(client, aborted) == "running")
        running.run(running.cluster.scale("clips", "dit.low_noise", 0))
    for request_id in (waiting, damaged, aborted):
        wait_for(lambda: state(client, request_id) == "queued", 30)  # noqa: B023 - called at once
        status = client.get(request_id)
        assert status.stage == types_pb2.STAGE_DIT and 0 < status.step < STEPS
    half = status.step
    assert steps(running, "high_noise") == before + 3 * half
    health = httpx.get(f"{running.base_url}/health")
    assert (health.status_code, health.json()["models"]) == (503, {"clips": False})
    assert health.json()["missing_experts"] == {"clips": ["low_noise"]}
    with pytest.raises(NotReady, match="'clips' has no dit replica with its expert low_noise now"):
        client.submit(PROMPT, **WISH)
    checkpoints = running.run_dir / "artifacts/latents"
    assert client.abort(aborted) == "cancelled"
    wait_for(lambda: len(list(checkpoints.iterdir())) == 2)
    [file] = checkpoints.glob(f"{damaged}.*")
    file.write_bytes(file.read_bytes()[:-50])
    running.run(running.cluster.scale("clips", "dit.low_noise", 1))
    for request_id in (waiting, damaged):
        wait_for(lambda: state(client, request_id) == "done", 90)  # noqa: B023 - called at once
        assert content(running, request_id) == resident
    # The one whose checkpoint was lost went back, and makes its first half once more.
    assert steps(running, "high_noise") == before + 4 * half
    assert steps(running, "low_noise") == 2 * (STEPS - half)
    with redis.Redis.from_url(running.redis_url) as store:
        again = [store.hget(f"{{ll}}:req:{request_id}", "denoised_again") for request_id in (waiting, damaged)]
    assert again == [None, b"1"]
    assert httpx.get(f"{running.base_url}/health").json()["missing_experts"] == {}


def test_replicas_of_one_expert_are_scaled_by_its_name(running, here):
    refused = here("scale", "dit=2", "--run-dir", running.run_dir)
    assert refused.returncode == 2
    assert "has no stage 'dit': there are text_encoder, dit.high_noise, dit.low_noise, vae" in refused.stderr
    shown = here("status", "--address", running.cluster.grpc_address)
    assert "dit.high_noise 1" in shown.stdout and "dit.low_noise 1" in shown.stdout


def test_a_cluster_without_an_expert_says_so_and_ends(model, tmp_path):
    table = {"models": {"clips": {**model, "experts": {"high_noise": {}}}}}
    missing = r"holds low_noise: give it \[models.clips.experts.low_noise\] with 1 replica"
    with pytest.raises(StartupError, match=missing), serving(tmp_path, table):
        pass
