"""The front of the fake stage: `python -m tests.cluster.fake_stage --config FILE`; its rank is `fake_rank`."""

from protos import dit_pb2
from services.front import serve_stage
from services.server import ensure_malloc, run_service

if __name__ == "__main__":
    ensure_malloc()
    run_service(lambda: serve_stage(dit_pb2.DESCRIPTOR.services_by_name["Dit"], "tests.cluster.fake_rank"))
