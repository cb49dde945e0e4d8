"""`python -m text_encoder_svc --config FILE`: the front of the service; its rank is `text_encoder_svc.rank`."""

from protos import text_encoder_pb2
from services.front import serve_stage
from services.parallel.degrees import TEXT_AXES
from services.server import ensure_malloc, run_service

if __name__ == "__main__":
    ensure_malloc()
    run_service(
        lambda: serve_stage(
            text_encoder_pb2.DESCRIPTOR.services_by_name["TextEncoder"], "text_encoder_svc.rank", axes=TEXT_AXES
        )
    )
