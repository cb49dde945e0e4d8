"""The front of a VAE whose rank is `fake_vae_rank`: `python -m tests.cluster.fake_vae_stage --config FILE`."""

from protos import vae_pb2
from services.front import serve_stage
from services.server import ensure_malloc, run_service

if __name__ == "__main__":
    ensure_malloc()
    run_service(lambda: serve_stage(vae_pb2.DESCRIPTOR.services_by_name["Vae"], "tests.cluster.fake_vae_rank"))
