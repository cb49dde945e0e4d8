"""Ranks that are threads, with plain memory for windows."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from services.parallel.peer_memory import PeerMemory


class Host:
    """Windows of ranks that are threads. Copies take their time, so that a rank that runs ahead would be seen."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.made: dict[tuple[int, int], torch.Tensor] = {}
        self.barrier = threading.Barrier(ranks, timeout=20)

    def maker(self, rank: int):
        count = iter(range(100))

        def make(size: int) -> Window:
            number = next(count)
            self.made[number, rank] = torch.zeros(size, dtype=torch.uint8)
            self.barrier.wait()
            return Window(self, number)

        return make


class Window:
    def __init__(self, host: Host, number: int) -> None:
        self._host, self._number = host, number

    def of(self, rank: int, shape, dtype: torch.dtype) -> torch.Tensor:
        time.sleep(random.random() / 500)
        memory = self._host.made[self._number, rank]
        return memory[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)

    def meet(self) -> None:
        self._host.barrier.wait()


def everywhere(ranks: int, work):
    host = Host(ranks)
    with ThreadPoolExecutor(ranks) as pool:
        running = [
            pool.submit(work, rank, PeerMemory(host.maker(rank), rank, torch.device("cpu"))) for rank in range(ranks)
        ]
        return host, [each.result() for each in running]
