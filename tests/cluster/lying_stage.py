"""The front of a lying stage: `python -m tests.cluster.lying_stage`; its config's `model.preset` says which one."""

from protos import dit_pb2, text_encoder_pb2, vae_pb2
from services.config import StageConfig
from services.front import serve_stage
from services.server import parse_arguments, run_service

SERVICES = {
    "text_encoder": text_encoder_pb2.DESCRIPTOR.services_by_name["TextEncoder"],
    "dit": dit_pb2.DESCRIPTOR.services_by_name["Dit"],
    "vae": vae_pb2.DESCRIPTOR.services_by_name["Vae"],
}

if __name__ == "__main__":
    preset = parse_arguments(StageConfig, "A stage that lies").model.preset
    run_service(lambda: serve_stage(SERVICES[preset], "tests.cluster.lying_rank"))
