"""Four rank processes for the whole session: starting one costs seconds, a job on them a fraction of one."""

from __future__ import annotations

import gc
import multiprocessing
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

SIZE = 4
TIMEOUT_S = 240.0


class RankPool:
    """Runs `tests.parallel.jobs` functions on the first ranks of the pool, each call in a process group of its own."""

    def __init__(self, size: int = SIZE) -> None:
        # Here and not above: ranks import this file before they have turned off the collector.
        from torch.distributed import TCPStore

        self._size = size
        # Where the ranks of a call meet: quicker than a file, which they would ask again and again.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._calls = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, name: str, world: int, *arguments: Any) -> list[Any]:
        """Results of `name(rank, world, *arguments)`, by rank."""
        self._calls += 1
        for end in self._ends[:world]:
            end.send((self._calls, name, world, arguments))
        end_s = time.monotonic() + TIMEOUT_S
        answers = [_answer(end, end_s) for end in self._ends[:world]]
        if None in answers:
            # A rank that stays in a collective would keep every later call waiting too.
            self.close()
            self._start()
        lost = (False, f"it died, or did not answer {name} within {TIMEOUT_S:g} s")
        told = [answer or lost for answer in answers]
        failures = [f"rank {rank}:\n{result}" for rank, (good, result) in enumerate(told) if not good]
        assert not failures, "\n".join(failures)
        return [result for _, result in told]

    def close(self) -> None:
        """Ends the processes."""
        for process, end in zip(self._processes, self._ends, strict=True):
            process.kill()
            process.join()
            end.close()


def _answer(end: Connection, end_s: float) -> tuple[bool, Any] | None:
    """Whether it went well, and what came of it; None of a rank that does not answer any more."""
    try:
        return end.recv() if end.poll(max(0.0, end_s - time.monotonic())) else None
    except EOFError:
        return None


def _serve(rank: int, port: int, end: Connection) -> None:
    gc.disable()
    import torch
    import torch.distributed as dist

    from tests.parallel import jobs

    gc.freeze()
    gc.enable()
    torch.set_num_threads(1)
    meeting = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            call, name, world, arguments = end.recv()
        except EOFError:
            return
        store = dist.PrefixStore(str(call), meeting)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        try:
            with torch.inference_mode():
                end.send((True, getattr(jobs, name)(rank, world, *arguments)))
        except Exception:  # noqa: BLE001 - the test that asked shows it
            end.send((False, traceback.format_exc()))
        finally:
            dist.destroy_process_group()
