"""The front of a sleeping stage: `python -m benchmarks.sleeping_stage --config FILE` (see sleeping_rank)."""

import sys

from protos import dit_pb2, text_encoder_pb2, vae_pb2
from services.config import read_toml
from services.front import serve_stage
from services.server import ensure_malloc, run_service

SERVICES = {
    "text_encoder": text_encoder_pb2.DESCRIPTOR.services_by_name["TextEncoder"],
    "dit": dit_pb2.DESCRIPTOR.services_by_name["Dit"],
    "vae": vae_pb2.DESCRIPTOR.services_by_name["Vae"],
}

if __name__ == "__main__":
    from pathlib import Path

    ensure_malloc()
    stage = read_toml(Path(sys.argv[sys.argv.index("--config") + 1]))["model"]["preset"]
    run_service(lambda: serve_stage(SERVICES[stage], "benchmarks.sleeping_rank"))
