"""What people import: Client, AsyncClient and Local."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import lightloom
from lightloom import AsyncClient, Client, Local
from lightloom.client import Progress
from services.errors import InvalidRequest, NotReady, StartupError, UnknownModel, UnknownRequest
from tests.cluster.running import wait_for

PROMPT = "a large green square on a white background"
MODEL = "demo/checkpoints/qwen_image"


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16)


@pytest.fixture(scope="module")
def local(running_cluster):
    with Local(model=MODEL, width=256, height=256, steps=4) as model:
        yield model


# ---- Client ----------------------------------------------------------------------------------------------------------


def test_generate_with_progress(client, tmp_path):
    seen: list[Progress] = []
    result = client.generate(PROMPT, seed=3, steps=4, output_format="jpeg", quality=80, on_progress=seen.append)
    assert [event.state for event in seen if event.state][0] == "queued"
    assert seen[-1].state == "done"
    assert sorted({event.step for event in seen})[-1] == 4
    assert (result.mime, result.width, result.height, result.seed) == ("image/jpeg", 256, 256, 3)
    path = result.save(tmp_path / "a.jpg")
    assert Image.open(path).format == "JPEG"
    assert set(result.busy_s) == {"text_encoder", "dit", "vae"}


def test_submit_get_list_models_and_trace(client):
    request_id = client.submit(PROMPT, steps=2, seed=1)
    assert client.submit(PROMPT, steps=2, idempotency_key="once") == client.submit(
        PROMPT, steps=2, idempotency_key="once"
    )
    done = wait_for(lambda: (status := client.get(request_id)).HasField("artifact") and status)
    assert done.params.seed == 1
    assert request_id in {status.request_id for status in client.list(5)}
    [model] = client.models()
    assert (model.name, model.ready, model.limits.default_width) == ("demo", True, 256)
    assert {span.name for span in client.trace(request_id)} >= {"dit.denoise", "vae.decode"}
    assert client.abort(request_id) == "done"


def test_errors_have_their_class(client):
    with pytest.raises(InvalidRequest, match="between 2 and 200") as caught:
        client.generate(PROMPT, steps=1000)
    assert caught.value.param == "steps"
    negative = (("width", -16, "64 and 1024"), ("steps", -1, "2 and 200"), ("preview_every", -1, "0 and 200"))
    for name, value, allowed in negative:
        with pytest.raises(InvalidRequest, match=f"{name} is {value}: it must be between {allowed}"):
            client.generate(PROMPT, **{name: value})
        with pytest.raises(InvalidRequest, match=f"between {allowed}"):
            client.submit(PROMPT, model="demo", **{name: value})
    for name, word in (("width", "wide"), ("steps", 2.5)):
        with pytest.raises(InvalidRequest, match=f"{name} is {word!r}: it must be a whole number"):
            client.generate(PROMPT, **{name: word})
    with pytest.raises(InvalidRequest, match="unknown option 'stepz': there are"):
        client.generate(PROMPT, stepz=3)
    with pytest.raises(UnknownModel):
        client.generate(PROMPT, model="none")
    for ask in (client.get, client.abort, client.trace):
        with pytest.raises(UnknownRequest):
            ask("none")
    with Client("127.0.0.1:1") as nobody, pytest.raises(NotReady):
        nobody.models()


# ---- AsyncClient -----------------------------------------------------------------------------------------------------


async def test_a_cancelled_task_aborts_its_request(running_cluster):
    async with AsyncClient(running_cluster.cluster.grpc_address) as client:
        seen: list[Progress] = []
        task = asyncio.create_task(client.generate(PROMPT, steps=200, on_progress=seen.append))
        async with asyncio.timeout(20):
            while not any(event.step for event in seen):
                await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while (await client.abort(seen[0].request_id)) != "cancelled":
                await asyncio.sleep(0.02)
        assert (await client.get(seen[0].request_id)).step < 200


async def test_many_at_once_and_watching(running_cluster):
    async with AsyncClient(running_cluster.cluster.grpc_address) as client:
        results = await asyncio.gather(*(client.generate(PROMPT, steps=2, seed=seed) for seed in (1, 2, 1)))
        first, second, again = (pixels(result.data) for result in results)
        assert np.abs(first - again).max() <= 1 < np.abs(first - second).max()
        request_id = await client.submit(PROMPT, steps=3)
        states = [progress.state async for progress in client.watch(request_id)]
        assert states[-1] == "done" and "running" in states
        # A follower that comes late sees the same end.
        assert [progress.state async for progress in client.watch(request_id)][-1] == "done"


async def test_a_submitted_request_outlives_its_client(running_cluster):
    async with AsyncClient(running_cluster.cluster.grpc_address) as client:
        request_id = await client.submit(PROMPT, steps=20)
    async with AsyncClient(running_cluster.cluster.grpc_address) as other:
        assert [progress.state async for progress in other.watch(request_id)][-1] == "done"


# ---- Local -----------------------------------------------------------------------------------------------------------


def test_local_makes_the_picture_of_the_cluster(local, client):
    ours, theirs = local.generate(PROMPT, seed=11), client.generate(PROMPT, seed=11, steps=4)
    assert np.abs(pixels(ours.data) - pixels(theirs.data)).max() <= 1
    assert set(ours.busy_s) == set(theirs.busy_s)
    assert (ours.width, ours.mime, ours.seed) == (256, "image/png", 11)


def test_local_makes_many_in_order(local):
    wishes = [{"prompt": PROMPT, "seed": seed, "width": width} for seed, width in ((1, 256), (2, 128), (3, 256))]
    results = local.generate_many(wishes)
    assert [(result.seed, result.width) for result in results] == [(1, 256), (2, 128), (3, 256)]
    assert np.abs(pixels(results[2].data) - pixels(local.generate(PROMPT, seed=3).data)).max() <= 1


def test_local_goes_on_after_a_bad_request(local, monkeypatch):
    with pytest.raises(InvalidRequest, match="not a multiple of 16"):
        local.generate(PROMPT, width=100)
    # The engine finds out then, when the other request is in it already.
    monkeypatch.setattr(local, "_limits", replace(local._limits, min_steps=1))
    with pytest.raises(InvalidRequest):
        local.generate_many([{"prompt": PROMPT}, {"prompt": PROMPT, "steps": 1}])
    assert local.generate(PROMPT, steps=2).data
    assert not local._dit.busy and not local._vae.busy


def test_local_that_cannot_be_opened():
    with pytest.raises(StartupError, match="nowhere does not exist"), Local(model="nowhere"):
        raise AssertionError("it opened")
    with pytest.raises(StartupError, match="context manager"):
        Local(model=MODEL).generate(PROMPT)


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'Remote'"):
        _ = lightloom.Remote  # type: ignore[attr-defined]
