"""Previews of unfinished pictures: they show what the picture will be, through REST and gRPC."""

from __future__ import annotations

import base64
import io

import numpy as np
import openai
import pytest
from PIL import Image

from lightloom.client import Client

GREEN = "a large green square on a white background"
BLUE = "a large blue circle on a yellow background"


def pixels(data: bytes, side: int = 32) -> np.ndarray:
    """A picture as [side, side, 3] in [0, 1]: the size of its latents."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), Image.Resampling.BOX)
    return np.asarray(image, np.float64) / 255


def likeness(one: bytes, other: bytes) -> float:
    """Correlation of two pictures' pixels."""
    return float(np.corrcoef(pixels(one).ravel(), pixels(other).ravel())[0, 1])


@pytest.fixture(scope="module")
def pictures(running_cluster):
    """Each prompt's previews, a step apart, and its final picture."""
    made = {}
    with Client(running_cluster.cluster.grpc_address) as client:
        for prompt in (GREEN, BLUE):
            previews: list[bytes] = []
            result = client.generate(
                prompt,
                seed=3,
                steps=10,
                preview_every=1,
                on_progress=lambda event, kept=previews: kept.append(event.preview) if event.preview else None,
            )
            made[prompt] = previews, result.data
    return made


def test_a_late_preview_resembles_its_own_picture_and_no_other(pictures):
    for prompt, other in ((GREEN, BLUE), (BLUE, GREEN)):
        previews, final = pictures[prompt]
        # None after the last step: the picture itself comes then.
        # No more than five a second go out, together with the steps.
        assert 3 <= len(previews) <= 9
        assert likeness(previews[-1], final) > 0.85
        assert likeness(previews[-1], pictures[other][1]) < 0.5
        assert np.abs(pixels(previews[-1]) - pixels(final)).mean() < 0.12


def test_previews_grow_like_the_picture(pictures):
    previews, final = pictures[GREEN]
    assert likeness(previews[-1], final) > likeness(previews[0], final) + 0.02


def test_the_openai_client_gets_its_partial_images(running_cluster):
    theirs = openai.OpenAI(base_url=f"http://{running_cluster.cluster.http_address}/v1", api_key="none", max_retries=0)
    events = list(
        theirs.images.generate(
            model="demo", prompt=GREEN, stream=True, partial_images=2, extra_body={"steps": 9, "seed": 3}
        )
    )
    assert [event.type.removeprefix("image_generation.") for event in events] == [
        "partial_image",
        "partial_image",
        "completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    first, second, final = (base64.b64decode(event.b64_json) for event in events)
    assert Image.open(io.BytesIO(first)).format == "JPEG"
    assert likeness(second, final) > 0.85


def test_without_being_asked_for_there_are_none(running_cluster):
    seen = []
    with Client(running_cluster.cluster.grpc_address) as client:
        client.generate(GREEN, steps=3, on_progress=seen.append)
    assert not [event for event in seen if event.preview]
