"""Collectives of the layouts on real GPUs: microseconds and GB/s, by the process group and by peer memory.

    python -m benchmarks.collectives --world 2

Results of both are compared. GB/s counts what a rank sends. Sizes are of the tensor that a rank brings: 12.6 and 37.7
MB are what Ulysses sends at 1024x1024 in Qwen-Image, one row; 503 MB is Wan's at 81 frames of 832x480.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.load import write_result
from services.parallel import collectives
from services.parallel.degrees import Degrees
from services.parallel.mesh import Mesh

SIZES_MB = (0.1, 1.6, 12.6, 25.2, 37.7, 100.0, 503.0)
CALLS = 20


def run_rank(rank: int, world: int, rendezvous: str, out: str) -> None:
    """One process."""
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", rendezvous, rank=rank, world_size=world)
    axis = Mesh(Degrees(ulysses=world), rank, "cuda")["ulysses"]
    peers = collectives.peer_memory.pop(axis.name, None)
    rows = []
    for megabytes in SIZES_MB:
        tensor = torch.randn(world, round(megabytes * 1e6 / 2 / world / 64) * 64, dtype=torch.bfloat16, device="cuda")
        for name, call in _calls(axis.name, world).items():
            collectives.peer_memory.pop(axis.name, None)
            expected, by_group = call(tensor), _seconds(call, tensor, name)
            row: dict[str, Any] = {"collective": name, "megabytes": megabytes, "group": by_group}
            if peers is not None:
                collectives.peer_memory[axis.name] = peers
                row["equal"] = all(torch.equal(call(tensor), expected) for _ in range(5))
                row["peer"] = _seconds(call, tensor, name)
            rows.append(row)
            if not rank:
                print(row, flush=True)
    if not rank:
        Path(out).write_text(json.dumps(rows))
    dist.destroy_process_group()


def _calls(group: str, world: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    return {
        "all_to_all": lambda tensor: collectives.all_to_all(tensor, group),
        "all_reduce": lambda tensor: collectives.all_reduce(tensor, group, world),
        "all_gather": lambda tensor: collectives.all_gather(tensor[0], group, world),
        "reduce_scatter": lambda tensor: collectives.reduce_scatter(tensor, group),
    }


def _seconds(call: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor, name: str) -> dict[str, float]:
    for _ in range(3):
        call(tensor)
    collectives.sent_bytes.clear()
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(CALLS):
        call(tensor)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started_s) / CALLS
    return {"us": seconds * 1e6, "gb_s": collectives.sent_bytes[name] / CALLS / seconds / 1e9}


def main() -> None:
    """Prints a line for each collective and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        spawn: Any = multiprocessing.spawn  # type: ignore[attr-defined]
        spawn(run_rank, (args.world, f"file://{folder}/rendezvous", str(out)), nprocs=args.world, join=True)
        write_result(args.json, "collectives", {"world": args.world, "rows": json.loads(out.read_text())})


if __name__ == "__main__":
    main()
