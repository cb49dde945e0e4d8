"""The official OpenAI client against a gateway, call for call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.cluster.gateway_process import GatewayProcess
from tests.cluster.sleeping import sleeping_gateway

PROMPT = "a red circle"
FAST = {"steps": 2}


@pytest.fixture(scope="module")
def running(tmp_path_factory, sleeping) -> Iterator[GatewayProcess]:
    with sleeping_gateway(tmp_path_factory.mktemp("openai"), sleeping) as made:
        yield made


def client_of(running: GatewayProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.rest.base_url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def theirs(running) -> openai.OpenAI:
    return client_of(running)


def test_the_url_of_an_image_can_be_opened_as_it_is(theirs, running):
    made = theirs.images.generate(prompt=PROMPT, n=2, response_format="url", extra_body=FAST)
    urls = [item.url for item in made.data]
    assert len(set(urls)) == 2
    for url in urls:
        assert url.startswith(str(running.rest.base_url))
        answer = httpx.get(url)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")


def test_the_url_names_the_host_that_the_client_called(running):
    body = {"prompt": PROMPT, "response_format": "url", **FAST}
    headers = {"Host": "pictures.example:8443", "X-Forwarded-Proto": "https"}
    [item] = running.rest.post("/v1/images/generations", json=body, headers=headers).json()["data"]
    assert item["url"].startswith("https://pictures.example:8443/v1/requests/")


def test_the_url_begins_with_the_public_one_where_that_is_configured(sleeping, tmp_path: Path):
    settings = {"gateway": {"public_url": "https://pictures.example/base/"}}
    with sleeping_gateway(tmp_path, sleeping, settings=settings) as other:
        made = client_of(other).images.generate(prompt=PROMPT, response_format="url", extra_body=FAST)
        path = made.data[0].url.removeprefix("https://pictures.example/base")
        assert path.startswith("/v1/requests/")
        assert other.rest.get(path).status_code == 200


def test_words_about_quality_and_style_are_taken(theirs):
    for quality in ("auto", "low", "medium", "high", "hd", "standard"):
        made = theirs.images.generate(prompt=PROMPT, quality=quality, style="vivid", extra_body=FAST)
        assert made.data[0].b64_json


def test_an_answer_has_its_request_id_and_a_usage(theirs, running):
    made = theirs.images.generate(prompt=PROMPT, extra_body=FAST)
    assert running.rest.get(f"/v1/requests/{made._request_id}").json()["state"] == "done"
    assert made._request_id == made.data[0].request_id
    assert (made.usage.total_tokens, made.usage.input_tokens_details.image_tokens) == (0, 0)
    with theirs.images.with_streaming_response.generate(prompt=PROMPT, stream=True, extra_body=FAST) as streamed:
        assert running.rest.get(f"/v1/requests/{streamed.headers['x-request-id']}").status_code == 200
    submitted = running.rest.post("/v1/requests", json={"prompt": PROMPT, **FAST})
    assert submitted.headers["x-request-id"] == submitted.json()["id"]


def test_a_model_can_be_asked_for(theirs):
    [listed] = theirs.models.list().data
    assert theirs.models.retrieve(listed.id) == listed
    with pytest.raises(openai.NotFoundError, match=f"unknown model 'none': there are {listed.id}"):
        theirs.models.retrieve("none")


PICTURE = {"image": b"\x89PNG\r\n\x1a\n"}
ASKED = ("prompt", PROMPT)
WRONG_FORMS = {
    "no picture": ([ASKED], {}, "image is missing"),
    "no prompt": ([], PICTURE, "prompt is required"),
    "an unknown file": ([ASKED], {"photo": b"1"}, "unknown file 'photo': allowed are image, mask"),
    "a clip's last picture": ([ASKED], {**PICTURE, "last_image": b"1"}, "unknown file 'last_image'"),
    "no number": ([ASKED, ("steps", "many")], PICTURE, "steps must be an integer"),
    "not finite": ([ASKED, ("guidance", "nan")], PICTURE, "guidance must be a finite number"),
    "a field twice": ([ASKED, ASKED], PICTURE, "prompt is there twice"),
    "an unknown field": ([ASKED, ("colour", "red")], PICTURE, "unknown field 'colour'"),
    "no type": ([ASKED], {"image": b"nothing"}, "no known type"),
}


@pytest.mark.parametrize("case", WRONG_FORMS)
def test_edits_that_cannot_be_are_refused(running, case):
    fields, files, text = WRONG_FORMS[case]
    parts = [(name, (None, value)) for name, value in fields] + [(name, (name, data)) for name, data in files.items()]
    answer = running.rest.post("/v1/images/edits", files=parts)
    assert answer.status_code == 400, answer.text
    assert text in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", "multipart/form-data", ""])
def test_a_body_that_is_no_form_is_refused(running, kind):
    headers = {"Content-Type": kind} if kind else {}
    answer = running.rest.post("/v1/images/edits", content=b"--x\r\nnothing", headers=headers)
    assert answer.status_code == 400, answer.text
    assert "multipart/form-data" in answer.json()["error"]["message"]
