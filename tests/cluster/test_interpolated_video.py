"""Interpolated clips through the real gateway: a tiny Wan model, its VAE streaming into the interpolation service."""

from __future__ import annotations

import io
import signal
import time
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from interpolation_svc.clip import Clip
from interpolation_svc.ifnet import IFNet, IFNetSpec
from interpolation_svc.weights import load_ifnet
from lightloom.client import Client
from protos import gateway_pb2, types_pb2
from services.errors import InvalidRequest
from services.families import load_family
from tests.cluster.running import serving, wait_for

PROMPT = "a red circle moves to the left"
SMALL = {"width": 96, "height": 64, "steps": 2, "num_frames": 9, "seed": 1}
SMOOTH = {"enable_frame_interpolation": True}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    torch.manual_seed(0)
    save_file(IFNet(IFNetSpec((16, 12, 8, 8), encodes=True)).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def running(weights, tmp_path_factory, monkeypatch_session):
    tiny = tmp_path_factory.mktemp("tiny")
    load_family("wan").tiny(tiny, "t2v", 0)
    models = {"clips": {"source": str(tiny)}}
    with serving(
        tmp_path_factory.mktemp("cluster"), {"models": models, "interpolation": {"source": str(weights), "threads": 1}}
    ) as running:
        yield running


@pytest.fixture
def client(running):
    with Client(running.cluster.grpc_address) as client:
        yield client


@pytest.fixture
def rest(running):
    with httpx.Client(base_url=running.base_url, timeout=120) as client:
        yield client


def state(client: Client, request_id: str) -> str:
    return gateway_pb2.RequestState.Name(client.get(request_id).state).removeprefix("REQUEST_STATE_").lower()


def pixels(result, frames: int) -> np.ndarray:
    return np.frombuffer(result.data, np.uint8).reshape(frames, 64, 96, 3)


def test_frames_of_the_model_and_others_between(client, weights):
    plain = client.generate(PROMPT, output_format="raw", **SMALL)
    smooth = client.generate(PROMPT, output_format="raw", frame_interpolation_exp=2, **SMOOTH, **SMALL)
    assert (smooth.num_frames, smooth.fps) == (33, 4 * plain.fps)
    assert np.array_equal(pixels(smooth, 33)[::4], pixels(plain, 9))
    with torch.inference_mode():
        frames = torch.from_numpy(pixels(plain, 9).copy())
        here = torch.cat(list(Clip(load_ifnet(weights), 2, 1.0, 8).add(frames))).numpy()
    assert np.abs(pixels(smooth, 33).astype(int) - here.astype(int)).max() <= 1
    assert {"vae", "interpolation"} <= set(smooth.busy_s)


@pytest.mark.parametrize("ask", [Client.generate, Client.submit])
def test_numbers_that_no_message_holds_are_refused_by_what_interpolation_accepts(client, ask):
    for exponent in (-1, 2**32):
        with pytest.raises(InvalidRequest, match=f"exp is {exponent}: it must be between 1 and 4") as caught:
            ask(client, PROMPT, frame_interpolation_exp=exponent, **SMOOTH, **SMALL)
        assert caught.value.param == "frame_interpolation_exp"
    with pytest.raises(InvalidRequest, match="num_frames is -9: it must be between 1 and"):
        ask(client, PROMPT, **SMOOTH, **SMALL | {"num_frames": -9})


def test_an_mp4_by_rest_and_its_trace(rest, client):
    wish = {"prompt": PROMPT, "fps": 12, "frame_interpolation_scale": 0.5, **SMOOTH, **SMALL, "num_frames": 33}
    made = rest.post("/v1/requests", json=wish).json()
    rest.get(f"/v1/requests/{made['id']}/events").raise_for_status()
    status = rest.get(f"/v1/requests/{made['id']}").json()
    assert (status["state"], status["error"]) == ("done", None)
    assert (status["artifact"]["num_frames"], status["artifact"]["fps"]) == (65, 24.0)
    with av.open(io.BytesIO(rest.get(f"/v1/requests/{made['id']}/content").content)) as container:
        stream = container.streams.video[0]
        assert (sum(1 for _ in container.decode(stream)), float(stream.average_rate)) == (65, 24.0)
    spans = {span.name: span for span in client.trace(made["id"])}
    decode, interpolate = spans["vae.decode"], spans["interpolate"]
    assert interpolate.start_unix_ns < decode.start_unix_ns + decode.duration_ns, (
        "frames left the VAE while it decoded others"
    )


def test_the_denoiser_goes_on_with_the_next_request_meanwhile(running, rest, client, here):
    """While one clip is decoded and interpolated, another makes its steps; `lightloom trace` of both shows it."""
    # Long enough for several events, of which there are five a second.
    large = {"width": 192, "height": 128, "num_frames": 49, "steps": 2}
    smooth = client.submit(PROMPT, frame_interpolation_exp=4, **SMOOTH, **large)
    following = client.submit(PROMPT, **{**SMALL, "num_frames": 17, "steps": 100, "seed": 7})
    wait_for(lambda: state(client, smooth) == state(client, following) == "done", 90)
    spans = {span.name: span for span in client.trace(smooth)}
    start_ns = spans["vae.decode"].start_unix_ns
    end_ns = spans["interpolate"].start_unix_ns + spans["interpolate"].duration_ns
    # An event's id begins with its time, in ms.
    blocks = rest.get(f"/v1/requests/{following}/events").text.split("\n\n")
    told_ms = [int(block.split("id: ")[1].split("-")[0]) for block in blocks if "event: step" in block]
    meanwhile = [ms for ms in told_ms if start_ns < ms * 1e6 < end_ns]
    assert len(meanwhile) >= 2, (told_ms, start_ns, end_ns)
    shown = here("trace", smooth, following, "--address", running.cluster.grpc_address).stdout.splitlines()
    bars = {
        (line.split()[0], line.split()[2]): range(line.index("█"), line.rindex("█") + 1)
        for line in shown
        if "█" in line
    }
    steps = set(bars[following[:8], "dit.denoise"])
    assert steps & set(bars[smooth[:8], "vae.decode"]) and steps & set(bars[smooth[:8], "interpolate"])


def test_a_smooth_clip_by_openais_call_from_json_and_from_a_form(rest):
    wish = {"prompt": PROMPT, "size": "96x64", "num_frames": 9, "steps": 2, "fps": 8, "frame_interpolation_exp": 2}
    as_form = {name: str(value) for name, value in wish.items()} | {"enable_frame_interpolation": "true"}
    for body in ({"json": wish | SMOOTH}, {"data": as_form}):
        answer = rest.post("/v1/videos/sync", **body)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4"), answer.text
        with av.open(io.BytesIO(answer.content)) as container:
            stream = container.streams.video[0]
            assert (sum(1 for _ in container.decode(stream)), float(stream.average_rate)) == (33, 32.0)
        length = rest.get(f"/v1/videos/{answer.headers['x-request-id']}").json()["seconds"]
        assert float(length) == pytest.approx(33 / 32), "as the file plays"


def test_progress_counts_the_frames_of_the_smooth_clip(rest):
    wish = {"prompt": PROMPT, "size": "208x160", "num_frames": 33, "steps": 2, "frame_interpolation_exp": 3, **SMOOTH}
    made = rest.post("/v1/videos", json=wish).json()
    seen = [made["progress"]]
    while seen[-1] < 100:
        time.sleep(0.02)
        now = rest.get(f"/v1/videos/{made['id']}").json()
        assert now["status"] in ("queued", "in_progress", "completed") and (now["progress"] == 100) == (
            now["status"] == "completed"
        )
        seen.append(now["progress"])
    assert seen == sorted(seen)
    assert len(set(seen) & set(range(91, 100))) >= 3, seen
    assert 0 < rest.get(f"/v1/requests/{made['id']}").json()["frames"] <= 32 * 8 + 1


def test_a_smooth_clip_from_the_command_line(running, here, tmp_path):
    target, address = tmp_path / "clip.mp4", running.cluster.grpc_address
    size = ("--size", "96x64", "--frames", 9, "--fps", 8, "--steps", 2)
    done = here("generate", PROMPT, "-o", target, "--address", address, "--interpolate", 2, *size)
    assert done.returncode == 0, done.stderr
    assert "33 frames at 32 a second" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("wish", "param", "says"),
    [
        ({"frame_interpolation_exp": 5}, "frame_interpolation_exp", "between 1 and 4"),
        ({"frame_interpolation_scale": 8.0}, "frame_interpolation_scale", "between 0.25 and 4.0"),
    ],
)
def test_what_is_not_allowed_is_refused_with_what_is(rest, client, wish, param, says):
    answer = rest.post("/v1/requests", json={"prompt": PROMPT, **SMALL, **SMOOTH, **wish})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", param)
    assert says in error["message"]
    with pytest.raises(InvalidRequest, match=says):
        client.generate(PROMPT, **SMALL, **SMOOTH, **wish)


def test_a_dead_interpolator_costs_the_hop_and_no_step(running, client):
    """The request goes on from its latents when the replica is back."""
    [name] = running.names("interpolation")
    steps = running.steps()
    rank = running.rank(name)
    # It takes nothing while it is stopped, so the request is there when it dies.
    rank.send_signal(signal.SIGSTOP)
    request_id = client.submit(PROMPT, frame_interpolation_exp=3, **SMOOTH, **{**SMALL, "seed": 2})
    wait_for(lambda: running.figures(name)["in_flight"] == 1, 30)
    rank.send_signal(signal.SIGKILL)
    wait_for(lambda: state(client, request_id) == "done", 60)
    assert client.get(request_id).artifact.num_frames == 65
    assert running.steps() - steps == SMALL["steps"], "nothing was denoised again"
    assert running.figures(name)["rank_restarts_total"] == 1
    wait_for(lambda: not running.leftovers(), 20)


def test_an_abort_ends_both_stages(running, client):
    [name] = running.names("interpolation")
    rank = running.rank(name)
    rank.send_signal(signal.SIGSTOP)
    try:
        request_id = client.submit(PROMPT, **SMOOTH, **{**SMALL, "seed": 3})
        wait_for(lambda: running.figures(name)["in_flight"] == 1, 30)
        client.abort(request_id)
    finally:
        rank.send_signal(signal.SIGCONT)
    wait_for(lambda: state(client, request_id) == "cancelled", 20)
    wait_for(lambda: running.figures(name)["in_flight"] == 0, 20)
    wait_for(lambda: not running.leftovers(), 20)


def test_without_an_interpolator_others_go_on_and_the_clip_waits(running, client):
    running.run(running.cluster.scale("", "interpolation", 0))
    wait_for(lambda: not httpx.get(f"{running.base_url}/health").json()["interpolation"], 20)
    waiting = client.submit(PROMPT, **SMOOTH, **{**SMALL, "seed": 4})
    assert client.generate(PROMPT, **{**SMALL, "seed": 5}).num_frames == 9
    wait_for(lambda: client.get(waiting).stage == types_pb2.STAGE_VAE, 20)
    assert state(client, waiting) == "queued"
    running.run(running.cluster.scale("", "interpolation", 1))
    wait_for(lambda: state(client, waiting) == "done", 60)
    assert client.get(waiting).artifact.num_frames == 17
