"""The benchmarks' sleeping rank that hardly sleeps: whatever a fuzzer asks for is done at once."""

from benchmarks import sleeping_rank
from services.rank_process import run

if __name__ == "__main__":
    sleeping_rank.STEP_S = 0.0001
    run(sleeping_rank.SleepingProgram)
