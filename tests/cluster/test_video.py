"""Clips through the real gateway: a tiny Wan model with two experts, gRPC, REST and the command line."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import av
import httpx
import numpy as np
import openai
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from lightloom.client import Client
from services.errors import InvalidRequest, NotEnabled
from services.families import load_family
from tests.cluster.running import serving

PROMPT = "a red circle moves to the left"
SMALL = {"width": 96, "height": 64, "steps": 5}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    load_family("wan").tiny(folder, "t2v", 0)
    return folder


@pytest.fixture(scope="module")
def clips(tiny, tmp_path_factory, monkeypatch_session):
    with serving(tmp_path_factory.mktemp("cluster"), {"models": {"clips": {"source": str(tiny)}}}) as running:
        yield running.cluster


@pytest.fixture
def client(clips):
    with Client(clips.grpc_address) as client:
        yield client


@pytest.fixture
def rest(clips):
    with httpx.Client(base_url=f"http://{clips.http_address}", timeout=120) as client:
        yield client


def facts(mp4: bytes) -> tuple[int, float, int, int]:
    """(frames, frames a second, width, height) of what a player would show."""
    with av.open(io.BytesIO(mp4)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert {frame.shape for frame in frames} == {(stream.height, stream.width, 3)}
        return len(frames), float(stream.average_rate), stream.width, stream.height


def test_a_clip_by_grpc(client):
    seen = []
    result = client.generate(PROMPT, num_frames=9, fps=12, seed=1, preview_every=2, on_progress=seen.append, **SMALL)
    assert result.mime == "video/mp4"
    assert facts(result.data) == (9, 12.0, 96, 64)
    assert (result.num_frames, result.fps, result.width, result.height) == (9, 12.0, 96, 64)
    assert max(event.step for event in seen) == SMALL["steps"]
    previews = [Image.open(io.BytesIO(event.preview)) for event in seen if event.preview]
    assert [preview.size for preview in previews] == [(48, 32), (48, 32)], "after steps 2 and 4, four pixels a latent"


def test_its_pixels_are_the_stock_pipelines(client, tiny):
    result = client.generate(PROMPT, num_frames=9, seed=1, output_format="raw", negative_prompt="still", **SMALL)
    ours = np.frombuffer(result.data, np.uint8).reshape(9, 64, 96, 3)
    pipeline = WanPipeline.from_pretrained(tiny, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=PROMPT,
        negative_prompt="still",
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        width=96,
        height=64,
        num_frames=9,
        num_inference_steps=SMALL["steps"],
        generator=torch.Generator().manual_seed(1),
    ).frames[0]
    # Guidance branches share a forward here, which costs the last bits: a value may round to its neighbour.
    apart = np.abs(ours.astype(int) - (theirs * 255).round().astype(int))
    assert apart.max() <= 1
    assert apart.mean() < 1e-3
    assert theirs.std() > 0.01


def test_a_clip_by_rest_at_the_models_own_rate(rest):
    made = rest.post("/v1/requests", json={"prompt": PROMPT, "num_frames": 5, "seed": 2, **SMALL}).json()
    rest.get(f"/v1/requests/{made['id']}/events").raise_for_status()
    status = rest.get(f"/v1/requests/{made['id']}").json()
    assert (status["state"], status["error"]) == ("done", None)
    assert (status["artifact"]["num_frames"], status["artifact"]["fps"]) == (5, 16.0)
    content = rest.get(f"/v1/requests/{made['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert facts(content.content) == (5, 16.0, 96, 64)


@pytest.mark.parametrize(("output_format", "mime"), [("gif", "image/gif"), ("zip", "application/zip")])
def test_a_clip_by_the_videos_call_as_gif_and_as_pictures(rest, output_format, mime):
    body = {"prompt": PROMPT, "num_frames": 9, "fps": 16, "seed": 1, "output_format": output_format}
    made = rest.post("/v1/videos/sync", json=body | {"size": "96x64", "steps": SMALL["steps"]})
    assert (made.status_code, made.headers["content-type"]) == (200, mime), made.text
    if output_format == "gif":
        with Image.open(io.BytesIO(made.content)) as image:
            durations_ms = [(image.seek(index), image.info["duration"])[1] for index in range(image.n_frames)]
            assert (image.size, durations_ms) == ((96, 64), [60, 60, 70, 60, 60, 70, 60, 60, 60])
        return
    with zipfile.ZipFile(io.BytesIO(made.content)) as archive:
        assert archive.namelist() == [f"{index:05}.png" for index in range(9)]
        assert {Image.open(archive.open(name)).size for name in archive.namelist()} == {(96, 64)}


def test_video_on_the_command_line_chooses_a_clips_format(clips, tmp_path):
    command = [sys.executable, "-m", "lightloom", "generate", PROMPT, "--video", "--address", clips.grpc_address]
    small = ["--size", "96x64", "--frames", "5", "--steps", "2"]
    run = partial(subprocess.run, capture_output=True, text=True, timeout=120, check=False)
    done = run([*command, *small], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert facts((tmp_path / "out.mp4").read_bytes()) == (5, 16.0, 96, 64)
    refused = run([*command, *small, "-o", "out.png"], cwd=tmp_path)
    assert refused.returncode == 2
    assert "--video writes .mp4, .webp, .gif, .zip, .raw" in " ".join(refused.stderr.split())


@pytest.mark.parametrize("ending", ["gif", "zip"])
def test_other_files_from_the_command_line(clips, tmp_path, ending):
    target = tmp_path / f"clip.{ending}"
    command = [sys.executable, "-m", "lightloom", "generate", PROMPT, "--video", "-o", str(target), "--address"]
    options = [clips.grpc_address, "--size", "96x64", "--frames", "5", "--steps", "2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(target) if ending == "gif" else zipfile.ZipFile(target) as file:
        assert (file.n_frames if ending == "gif" else len(file.namelist())) == 5


def test_a_clip_from_the_command_line(clips, tmp_path):
    target = tmp_path / "clip.mp4"
    command = [sys.executable, "-m", "lightloom", "generate", PROMPT, "-o", str(target), "--address"]
    options = [clips.grpc_address, "--size", "64x96", "--frames", "13", "--fps", "24", "--steps", "3"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "64x96, 13 frames at 24 a second" in " ".join(done.stderr.split())
    assert facts(target.read_bytes()) == (13, 24.0, 64, 96)


@pytest.mark.parametrize(
    ("wish", "param", "says"),
    [
        ({"num_frames": 10}, "num_frames", "use 9 or 13"),
        ({"num_frames": 85}, "num_frames", "between 1 and 81"),
        ({"fps": 0.5}, "fps", "between 1.0 and 120.0"),
        ({"fps": 0}, "fps", "between 1.0 and 120.0"),
        ({"fps": -1}, "fps", "between 1.0 and 120.0"),
        ({"fps": 1000.0}, "fps", "between 1.0 and 120.0"),
        ({"width": 72}, "width", "use 64 or 80"),
        ({"output_format": "png"}, "output_format", "use one of mp4, webp, gif, zip, raw"),
    ],
)
def test_what_is_not_allowed_is_refused_with_what_is(rest, client, wish, param, says):
    answer = rest.post("/v1/requests", json={"prompt": PROMPT, **SMALL, **wish})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", param)
    assert says in error["message"]
    with pytest.raises(InvalidRequest, match=says):
        client.generate(PROMPT, **{**SMALL, **wish})


@pytest.mark.parametrize("wish", [{"frame_interpolation_exp": 1}, {"frame_interpolation_scale": 0.5}])
@pytest.mark.parametrize("path", ["/v1/requests", "/v1/videos"])
def test_how_to_interpolate_counts_for_nothing_without_the_switch_and_is_refused(rest, client, path, wish):
    [param] = wish
    answer = rest.post(path, json={"prompt": PROMPT, **wish})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", param)
    assert "enable_frame_interpolation is false: set that to true" in error["message"]
    with pytest.raises(InvalidRequest, match="enable_frame_interpolation is false"):
        client.generate(PROMPT, **wish)


def test_more_frames_need_an_interpolation_service(rest, client):
    answer = rest.post("/v1/requests", json={"prompt": PROMPT, "enable_frame_interpolation": True, **SMALL})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (501, "not_enabled", "enable_frame_interpolation")
    with pytest.raises(NotEnabled, match="no interpolation service"):
        client.generate(PROMPT, enable_frame_interpolation=True, **SMALL)


# ---- OpenAI's videos API ----------------------------------------------------------------------------------------


@pytest.fixture
def theirs(clips):
    return openai.OpenAI(base_url=f"http://{clips.http_address}/v1", api_key="none", max_retries=0)


BRIEF = {"steps": 3, "guidance": 1.0, "seed": 3}


def test_the_official_client_makes_polls_fetches_and_lists_a_clip(theirs, rest):
    video = theirs.videos.create(prompt=PROMPT, model="clips", seconds="0.5", size="96x64", extra_body=BRIEF)
    assert (video.object, video.model, video.size, video.error) == ("video", "clips", "96x64", None)
    # 0.5 s at 16 frames a second: 9 frames are nearer than 5.
    assert float(video.seconds) == pytest.approx(9 / 16)
    done = theirs.videos.poll(video.id, poll_interval_ms=50)
    assert (done.status, done.progress) == ("completed", 100)
    assert done.created_at <= done.completed_at
    data = theirs.videos.download_content(video.id).read()
    assert facts(data) == (9, 16.0, 96, 64)
    part = rest.get(f"/v1/videos/{video.id}/content", headers={"Range": "bytes=4-11"})
    assert (part.status_code, part.content) == (206, data[4:12])
    listed = theirs.videos.list(limit=1)
    assert [one.id for one in listed.data] == [video.id]
    older = theirs.videos.list(after=video.id).data
    assert all(one.created_at <= video.created_at and one.id != video.id for one in older)
    # Page by page, in both orders: the client goes on while there is more.
    assert [one.id for one in theirs.videos.list(limit=1)] == [video.id, *(one.id for one in older)]
    assert [one.id for one in theirs.videos.list(limit=1, order="asc")] == [*(one.id for one in older[::-1]), video.id]
    # What is done stays.
    assert theirs.videos.delete(video.id).deleted is False
    assert theirs.videos.retrieve(video.id).status == "completed"


def test_progress_grows_with_steps_and_delete_aborts(theirs):
    video = theirs.videos.create(prompt=PROMPT, seconds="4", size="96x64", extra_body={"steps": 100})
    seen = [video.progress]
    while seen[-1] < 10:
        seen.append(theirs.videos.retrieve(video.id).progress)
    assert seen == sorted(seen)
    assert theirs.videos.delete(video.id).deleted is True
    ended = theirs.videos.poll(video.id, poll_interval_ms=20)
    assert (ended.status, ended.error.code) == ("failed", "cancelled")
    with pytest.raises(openai.APIStatusError) as refused:
        theirs.videos.download_content(video.id)
    assert refused.value.status_code == 409


def test_progress_goes_on_with_decoded_frames(theirs):
    video = theirs.videos.create(prompt=PROMPT, seconds="5", size="208x160", extra_body={"steps": 2, "guidance": 1.0})
    seen = [video]
    while seen[-1].status in ("queued", "in_progress"):
        time.sleep(0.02)
        seen.append(theirs.videos.retrieve(video.id))
    progress = [one.progress for one in seen]
    assert progress == sorted(progress)
    assert seen[-1].status == "completed" and progress.index(100) == len(progress) - 1
    assert len(set(progress) & set(range(91, 100))) >= 2, progress


def test_the_bar_goes_on_with_decoded_frames(here, clips, tmp_path, monkeypatch):
    monkeypatch.setattr("lightloom.client.FRAMES_EVERY_S", 0.05)
    # As on a terminal.
    monkeypatch.setenv("FORCE_COLOR", "1")
    target = tmp_path / "clip.mp4"
    wish = ("--size", "208x160", "--frames", 81, "--steps", 2, "--guidance", 1.0)
    done = here("generate", PROMPT, "-o", target, *wish, "--address", clips.grpc_address)
    assert done.returncode == 0, done.stderr
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stderr)
    made = [int(count) for count in re.findall(r"frames \S+ +(\d+)/81", shown)]
    assert made == sorted(made) and len(set(made)) >= 2, shown


def test_a_clip_in_one_call_from_json(rest):
    answer = rest.post("/v1/videos/sync", json={"prompt": PROMPT, "num_frames": 5, "size": "96x64", **BRIEF})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert facts(answer.content) == (5, 16.0, 96, 64)
    assert rest.get(f"/v1/videos/{answer.headers['x-request-id']}").json()["status"] == "completed"


@pytest.mark.parametrize(
    ("wish", "param", "says"),
    [
        ({"seconds": "0"}, "seconds", "a number above 0"),
        ({"seconds": "nan"}, "seconds", "a number above 0"),
        ({"seconds": "long"}, "seconds", "a number above 0"),
        ({"seconds": 12}, "seconds", "at most 5.06"),
        ({"seconds": 1e308}, "seconds", "at most 5.06"),
        ({"seconds": "0.5", "fps": 0}, "fps", "between 1.0 and 120.0"),
        ({"seconds": 2, "fps": -1e308}, "fps", "between 1.0 and 120.0"),
        ({"seconds": "0.5", "num_frames": 81}, "seconds", "mean the same and differ"),
        ({"size": "72x64"}, "width", "use 64 or 80"),
        ({"remix": "x"}, "remix", "unknown field"),
        ({"input_reference": "data:image/png;base64,AAAA"}, "input_reference.0", "of no known type"),
        ({"model": "nobody"}, "model", "clips"),
    ],
)
def test_a_wish_for_a_video_that_cannot_be_is_refused(rest, wish, param, says):
    body = {"prompt": PROMPT, "size": "96x64", **wish}
    for path in ("/v1/videos", "/v1/videos/sync"):
        answer = rest.post(path, json=body)
        assert answer.status_code in (400, 404), answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert says in error["message"]
    form = rest.post("/v1/videos", data={name: str(value) for name, value in body.items()})
    assert form.json()["error"]["param"] == param


def test_a_reference_is_read_as_url_as_object_and_as_file_and_refused_by_a_model_that_takes_none(rest, theirs):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    for reference in (url, [url], {"image_url": url}):
        answer = rest.post("/v1/videos", json={"prompt": PROMPT, "size": "96x64", "input_reference": reference})
        assert "takes no input pictures" in answer.json()["error"]["message"]
    with pytest.raises(openai.BadRequestError, match="takes no input pictures"):
        theirs.videos.create(prompt=PROMPT, size="96x64", input_reference=file.getvalue())


def test_the_images_calls_send_clips_to_their_own(rest):
    for body in ({}, {"output_format": "webp"}):
        answer = rest.post("/v1/images/generations", json={"prompt": PROMPT, **body})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "model 'clips' makes video: call /v1/videos"


def test_a_models_limits_name_the_roles_of_its_inputs(rest):
    [model] = rest.get("/v1/models").json()["data"]
    assert model["limits"]["needed_roles"] == [] == model["limits"]["optional_roles"]


def test_what_is_no_video_is_unknown_and_what_is_no_json_is_refused(rest):
    assert rest.get("/v1/videos/nothing").status_code == 404
    assert rest.get("/v1/videos", params={"after": "nothing"}).status_code == 404
    assert rest.get("/v1/videos/nothing/content", params={"variant": "thumbnail"}).json()["error"]["param"] == "variant"
    for content, kind in ((b"{", "application/json"), (b"\xff", "application/json"), (b"", "multipart/form-data")):
        answer = rest.post("/v1/videos", content=content, headers={"Content-Type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
