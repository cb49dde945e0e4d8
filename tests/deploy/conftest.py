"""The chart rendered: with every set of values in turn, and with the one that switches everything on."""

from __future__ import annotations

import pytest

from tests.deploy.chart import EVERYTHING, VALUES, Object, render


@pytest.fixture(scope="session", params=VALUES, ids=lambda path: path.stem)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(request.param)


@pytest.fixture(scope="session")
def everything() -> list[Object]:
    return render(EVERYTHING)
