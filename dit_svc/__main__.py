"""`python -m dit_svc --config FILE`: the front of the service; its rank is `dit_svc.rank`."""

from protos import dit_pb2
from services.front import serve_stage
from services.parallel.degrees import DIT_AXES
from services.server import ensure_malloc, run_service

if __name__ == "__main__":
    ensure_malloc()
    run_service(lambda: serve_stage(dit_pb2.DESCRIPTOR.services_by_name["Dit"], "dit_svc.rank", axes=DIT_AXES))
