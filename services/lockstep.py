"""Ranks of a group go together: before every tick rank 0 says how many frames all of them handle, and which calls wait.

Every rank gets the same frames in the same order from the front, and what a program does follows from the frames, the
ticks between them and the calls whose callers are behind, which rank 0 alone can see. So these are all that the ranks
must agree on; everything else they decide alike.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from services.channel import Frame, FrameQueue
from services.config import StageConfig, choose_interface
from services.errors import StartupError
from services.parallel.degrees import Degrees, check_devices
from services.parallel.mesh import TIMEOUT, Mesh


class Lockstep:
    """One rank's part in it; on a rank of its own there is nobody to ask."""

    def __init__(self, rank: int, world: int) -> None:
        self._rank = rank
        # On the CPU: the number must not wait for the device.
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if world > 1 else None

    def take(
        self, inbox: FrameQueue, timeout_s: float, full: Callable[[], list[int]] = list
    ) -> tuple[list[Frame], list[int]]:
        """The frames to handle now, and the calls without room for more.

        Rank 0 waits for the first frame, `timeout_s` at most, and then asks `full`; the others wait for rank 0.
        """
        if self._group is None:
            return inbox.take(timeout_s), full()
        frames = inbox.take(timeout_s) if not self._rank else []
        calls = torch.tensor(full() if not self._rank else [], dtype=torch.int64)
        counts = torch.tensor([len(frames), len(calls)])
        dist.broadcast(counts, 0, group=self._group)
        num_frames, num_calls = counts.tolist()
        if num_calls:
            calls = calls if not self._rank else torch.empty(num_calls, dtype=torch.int64)
            dist.broadcast(calls, 0, group=self._group)
        return inbox.take_exactly(num_frames) if self._rank else frames, calls.tolist()


def take_gpus(config: StageConfig) -> bool:
    """Whether the ranks of a group take a GPU each.

    Raises:
        StartupError: they do, and there are too few on this host.
    """
    device, degrees = config.model.device, Degrees.of(config.parallel)
    if not (device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())):
        return False
    if device.startswith("cuda:"):
        raise StartupError(f"model.device is {device!r}, but {degrees.world} ranks take a device each: use cuda")
    check_devices(degrees, len(config.parallel.hosts) + 1, torch.cuda.device_count())
    return True


def join_group(config: StageConfig, rank: int, world: int, rendezvous: str) -> Mesh | None:
    """Brings the process into its group; None for a rank of its own. On CUDA rank i takes device i.

    Raises:
        StartupError: there are more ranks than devices.
    """
    if world == 1:
        return None
    cuda = take_gpus(config)
    if cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if rendezvous.startswith("tcp://"):
        choose_interface(urlsplit(rendezvous).hostname or "")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world, timeout=TIMEOUT)
    return Mesh(Degrees.of(config.parallel), rank, "cuda" if cuda else "cpu")
