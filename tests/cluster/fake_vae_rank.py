"""The VAE's rank with a model of a few lines: its chunks of frames are large and take it no time."""

from services.rank_process import run
from tests.unit.test_vae_engine import FakeVae
from vae_svc import rank
from vae_svc.engine import VaeEngine

if __name__ == "__main__":
    rank.open_engine = lambda *_: VaeEngine(FakeVae().part(), None, 1)
    run(rank.VaeProgram)
