"""`python -m vae_svc --config FILE`: the front of the service; its rank is `vae_svc.rank`."""

from protos import vae_pb2
from services.front import serve_stage
from services.parallel.degrees import VAE_AXES
from services.server import ensure_malloc, run_service

if __name__ == "__main__":
    ensure_malloc()
    run_service(lambda: serve_stage(vae_pb2.DESCRIPTOR.services_by_name["Vae"], "vae_svc.rank", axes=VAE_AXES))
