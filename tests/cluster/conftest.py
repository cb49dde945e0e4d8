"""One cluster for the whole session: Redis, two DiT replicas, text encoder, VAE, two gateways; and clients to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from lightloom.cli import main
from lightloom.client import Client
from tests.cluster.running import RunningCluster
from tests.cluster.sleeping import sleeping_stages


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory, monkeypatch_session):
    running = RunningCluster(tmp_path_factory.mktemp("run"), {"dit": 2}, gateways=2)
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def monkeypatch_session():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        yield patch


@pytest.fixture(scope="session")
def sleeping(tmp_path_factory, monkeypatch_session):
    """Stages that sleep instead of computing, for all who bring a Redis and gateways of their own."""
    with sleeping_stages(tmp_path_factory.mktemp("sleeping"), {"text_encoder": 64, "dit": 64, "vae": 64}) as stages:
        yield stages


@pytest.fixture(scope="session")
def one_by_one(sleeping, tmp_path_factory):
    """The same, with a denoiser of a single slot."""
    with sleeping_stages(tmp_path_factory.mktemp("one"), {"dit": 1}) as stages:
        yield {**sleeping, **stages}


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs a `lightloom` command in this process, which has torch: one of its own would take seconds to import it."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["lightloom", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, ended.value.code, said.out, said.err)

    return run


@pytest.fixture
def base_url(running_cluster):
    return running_cluster.base_url


@pytest.fixture
def rest(base_url):
    with httpx.Client(base_url=base_url, timeout=60) as client:
        yield client


@pytest.fixture
def client(running_cluster):
    with Client(running_cluster.cluster.grpc_address) as client:
        yield client
