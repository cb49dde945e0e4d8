"""The official OpenAI client against a gateway, call for call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.cluster.gateway_process import GatewayProcess, gateway
from tests.cluster.sleeping import SleepingCluster, sleeping_cluster

PROMPT = "a red circle"
FAST = {"steps": 2}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[SleepingCluster]:
    with sleeping_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="module")
def running(cluster, tmp_path_factory) -> Iterator[GatewayProcess]:
    folder = tmp_path_factory.mktemp("gateway")
    with gateway(folder, cluster.redis_url, cluster.addresses) as made:
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


def test_the_url_begins_with_the_public_one_where_that_is_configured(cluster, tmp_path: Path):
    settings = {"gateway": {"public_url": "https://pictures.example/base/"}}
    with gateway(tmp_path, cluster.redis_url, cluster.addresses, settings=settings) as other:
        made = client_of(other).images.generate(prompt=PROMPT, response_format="url", extra_body=FAST)
        path = made.data[0].url.removeprefix("https://pictures.example/base")
        assert path.startswith("/v1/requests/")
        assert other.rest.get(path).status_code == 200
