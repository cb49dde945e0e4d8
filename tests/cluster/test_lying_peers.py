"""A stage that sends wrong tensors: the request fails with a clear error, and every service lives and is clean."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.config import environment_with_malloc
from services.free_port import free_port
from tests.cluster.gateway_process import ROOT, GatewayProcess, gateway
from tests.cluster.running import RunningCluster, figures, wait_for

STAGES = ("text_encoder", "dit", "vae")


class Liar:
    """A lying stage, and a gateway that uses it with the cluster's honest ones."""

    def __init__(self, stage: str, folder: Path) -> None:
        self.stage = stage
        self.port, self.metrics_port = free_port(), free_port()
        config = folder / "liar.toml"
        config.write_text(
            f"[service]\nport = {self.port}\nmetrics_port = {self.metrics_port}\n"
            f'[model]\nname = "demo"\nsource = "none"\npreset = "{stage}"\n'
        )
        command = (sys.executable, "-m", "tests.cluster.lying_stage", "--config", config)
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment_with_malloc())
        self.gateway: GatewayProcess

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def liars(running_cluster: RunningCluster, tmp_path_factory) -> Iterator[dict[str, Liar]]:
    honest = {stage: running_cluster.address(running_cluster.names(stage)[0]) for stage in STAGES}
    made = {stage: Liar(stage, tmp_path_factory.mktemp(stage)) for stage in STAGES}
    with contextlib.ExitStack() as stack:
        for number, (stage, liar) in enumerate(made.items(), 1):
            stack.callback(liar.stop)
            # A database of its own: the cluster's gateways must not take these requests.
            url = running_cluster.redis_url.removesuffix("/0") + f"/{number}"
            stages = honest | {stage: f"127.0.0.1:{liar.port}"}
            liar.gateway = stack.enter_context(gateway(tmp_path_factory.mktemp("gateway"), url, stages))
        yield made


@pytest.fixture
def lying(request, liars) -> Liar:
    return liars[request.param]


MISMATCH = (502, "stage_mismatch")
CORRUPT = (502, "corrupt_tensor")
LIES = {
    "text_encoder": {
        "shape": (*MISMATCH, "must be [1, T, 192]"),
        "dtype": (*MISMATCH, "must be a floating-point type"),
        "name": (*MISMATCH, "'positive/text' is missing"),
        "nan": (500, "non_finite", "step 1 of 2"),
        "crc": (*CORRUPT, "crc32c"),
        "huge": (*CORRUPT, "at most"),
        "cut": (*CORRUPT, "before the conditions were whole"),
        "more": (*MISMATCH, "more tensor bundles"),
    },
    "dit": {
        "shape": (*MISMATCH, "needs 'latents' of shape [1, 256, 64]"),
        "dtype": (*MISMATCH, "floating-point latents"),
        "name": (*MISMATCH, "needs 'latents'"),
        "nan": (500, "non_finite", "not finite"),
        "crc": (*CORRUPT, "crc32c"),
        "huge": (*CORRUPT, "at most"),
        "cut": (*CORRUPT, "before its latents were whole"),
    },
    "vae": {"short": (*CORRUPT, "announced 1000 bytes and sent 4")},
}


def ask(lying: Liar, prompt: str, **more: object):
    body = {"prompt": prompt, "steps": 2, "size": "256x256", **more}
    return lying.gateway.rest.post("/v1/images/generations", json=body)


def clean(lying: Liar, running: RunningCluster) -> bool:
    """Whether nobody holds anything of the request."""
    store = [path for path in lying.gateway.store.rglob("*") if path.is_file()]
    liar = figures(lying.metrics_port)
    return not (running.leftovers() or store or liar["in_flight"] or liar["rank_jobs"])


@pytest.mark.parametrize(
    ("lying", "lie"), [(stage, lie) for stage, lies in LIES.items() for lie in lies], indirect=["lying"]
)
def test_a_lie_fails_its_request_only(lying, running_cluster, lie):
    ranks = {name: running_cluster.rank(name).pid for stage in STAGES for name in running_cluster.names(stage)}
    status, code, words = LIES[lying.stage][lie]
    answer = ask(lying, lie)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), answer.text
    assert words in error["message"]
    wait_for(lambda: clean(lying, running_cluster))
    assert lying.gateway.health() == 200
    assert {name: running_cluster.rank(name).pid for name in ranks} == ranks


@pytest.mark.parametrize("lying", ["text_encoder", "dit"], indirect=True)
def test_the_truth_passes(lying):
    assert ask(lying, "the truth").status_code == 200


@pytest.mark.parametrize("lying", ["vae"], indirect=True)
def test_previews_that_nobody_can_make_are_refused(lying):
    """The lying VAE announces no latent-to-RGB fit, as one without an encoder does."""
    body = {"prompt": "a cat", "steps": 2, "preview_every": 1}
    answer = lying.gateway.rest.post("/v1/requests", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "preview_every")
    assert "makes no previews" in answer.json()["error"]["message"]
    assert ask(lying, "a cat", stream=True, partial_images=1).status_code == 400
