"""What several files of unit tests need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightloom.redis_server import start_redis


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis for the tests of one file."""
    server = start_redis(Path(tmp_path_factory.mktemp("redis")))
    yield server.url
    server.stop()
