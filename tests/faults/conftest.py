"""One cluster for all scenarios, and what every recipe gives without a fault."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.cluster.redis_process import sentinels
from tests.faults.cluster import FaultCluster
from tests.faults.run import reference_of

REPLICAS = {"text_encoder": 1, "dit": 3, "vae": 1}


@pytest.fixture(scope="module")
def here():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        patch.delenv("REDIS_URL", raising=False)
        yield


@pytest.fixture(scope="module")
def fault_cluster(here, tmp_path_factory):
    with FaultCluster(tmp_path_factory.mktemp("faults"), REPLICAS) as cluster:
        yield cluster


@pytest.fixture
def poisoned_cluster(here, tmp_path):
    """One denoiser, which has all requests at once, and the usual number of attempts."""
    replicas = {"text_encoder": 1, "dit": 1, "vae": 1}
    with FaultCluster(tmp_path, replicas, gateway={"max_attempts": 3}, max_in_flight=8) as cluster:
        yield cluster


@pytest.fixture
def sentinel_cluster(here, tmp_path):
    """Its Redis has two replicas and three Sentinels."""
    with sentinels(tmp_path / "redis") as servers, FaultCluster(tmp_path, REPLICAS, sentinels=servers) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def reference(fault_cluster):
    return asyncio.run(reference_of(fault_cluster))


@pytest.fixture
def cluster(fault_cluster, reference):
    """Ready again, after what the last test did to it."""
    fault_cluster.until_ready()
    return fault_cluster
