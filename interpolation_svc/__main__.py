"""`python -m interpolation_svc --config FILE`: the front of the service; its rank is `interpolation_svc.rank`."""

from protos import interpolation_pb2
from services.front import serve_stage
from services.server import ensure_malloc, run_service

if __name__ == "__main__":
    ensure_malloc()
    service = interpolation_pb2.DESCRIPTOR.services_by_name["Interpolation"]
    run_service(lambda: serve_stage(service, "interpolation_svc.rank"))
