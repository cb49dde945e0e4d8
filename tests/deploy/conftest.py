"""The chart rendered: with every set of values in turn, and with the one that switches everything on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.chart import EVERYTHING, VALUES, Object, render
from tests.deploy.networks import Network, choose


@pytest.fixture(scope="session", params=VALUES, ids=lambda path: path.stem)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(request.param)


@pytest.fixture(scope="session")
def everything() -> list[Object]:
    return render(EVERYTHING)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """What pods that run as processes are connected by."""
    chosen = choose(tmp_path / "dns")
    yield chosen
    chosen.close()
