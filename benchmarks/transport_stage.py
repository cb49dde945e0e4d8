"""The front of the stage that only moves tensors: `python -m benchmarks.transport_stage --config FILE`."""

from protos import dit_pb2
from services.front import serve_stage
from services.server import ensure_malloc, run_service

if __name__ == "__main__":
    ensure_malloc()
    run_service(lambda: serve_stage(dit_pb2.DESCRIPTOR.services_by_name["Dit"], "benchmarks.transport_rank"))
