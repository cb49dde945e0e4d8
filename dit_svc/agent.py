"""`python -m dit_svc.agent --listen HOST:PORT`: lends this host's devices to a denoiser led from another host."""

from services.rank_agent import serve_agent
from services.server import ensure_malloc, run_service

if __name__ == "__main__":
    ensure_malloc()
    run_service(lambda: serve_agent("dit_svc.rank"))
