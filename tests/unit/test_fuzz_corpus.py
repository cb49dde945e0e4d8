"""What the fuzzers found worth keeping (`python -m tests.fuzz`), once more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.seeds import write_seeds
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parents[1] / "fuzz/corpus"


@pytest.mark.parametrize("target", TARGETS)
def test_every_kept_input_is_taken_or_refused(target: str) -> None:
    inputs = sorted((CORPUS / target).iterdir())
    assert len(inputs) > 20
    for path in inputs:
        TARGETS[target](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_the_seeds_are_right_inputs(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the fuzzers would only ever see refusals."""
    monkeypatch.setattr("contextlib.suppress.__exit__", lambda *_: False)
    write_seeds(target, tmp_path)
    for path in tmp_path.iterdir():
        TARGETS[target](path.read_bytes())
