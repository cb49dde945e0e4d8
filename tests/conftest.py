"""What imports bring stays: it is not looked through for garbage while tests are collected, nor while they run."""

from __future__ import annotations

import gc

gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
