"""The front of an instant stage: `python -m tests.fuzz.instant_stage --config FILE`."""

import sys
from pathlib import Path

from benchmarks.sleeping_stage import SERVICES
from services.config import read_toml
from services.front import serve_stage
from services.server import ensure_malloc, run_service

if __name__ == "__main__":
    ensure_malloc()
    stage = read_toml(Path(sys.argv[sys.argv.index("--config") + 1]))["model"]["preset"]
    run_service(lambda: serve_stage(SERVICES[stage], "tests.fuzz.instant_rank"))
