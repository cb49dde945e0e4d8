"""The front of a recording stage: `python -m tests.faults.stage --config FILE` (see rank)."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.sleeping_stage import SERVICES
from services.config import read_toml
from services.front import serve_stage
from services.server import ensure_malloc, run_service

RANK = "tests.faults.rank"


def main() -> None:
    """Serves the stage that the config names."""
    ensure_malloc()
    stage = read_toml(Path(sys.argv[sys.argv.index("--config") + 1]))["model"]["preset"]
    run_service(lambda: serve_stage(SERVICES[stage], RANK))


if __name__ == "__main__":
    main()
