"""Ranks of a group go together: before every tick rank 0 says how many frames all of them handle.

Every rank gets the same frames in the same order from the front, and what a program does follows from the frames and
the ticks between them. So one number a tick is all that the ranks must agree on; everything else they decide alike.
"""

from __future__ import annotations

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

    def take(self, inbox: FrameQueue, timeout_s: float) -> list[Frame]:
        """The frames to handle now. Rank 0 waits for the first one, `timeout_s` at most; the others wait for rank 0."""
        if self._group is None:
            return inbox.take(timeout_s)
        frames = inbox.take(timeout_s) if not self._rank else []
        count = torch.tensor([len(frames)])
        dist.broadcast(count, 0, group=self._group)
        return inbox.take_exactly(int(count)) if self._rank else frames


def join_group(config: StageConfig, rank: int, world: int, rendezvous: str) -> Mesh | None:
    """Brings the process into its group; None for a rank of its own. On CUDA rank i takes device i.

    Raises:
        StartupError: there are more ranks than devices.
    """
    if world == 1:
        return None
    device = config.model.device
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    degrees = Degrees.of(config.parallel)
    if cuda:
        if device.startswith("cuda:"):
            raise StartupError(f"model.device is {device!r}, but {world} ranks take a device each: use cuda")
        check_devices(degrees, len(config.parallel.hosts) + 1, torch.cuda.device_count())
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if rendezvous.startswith("tcp://"):
        choose_interface(urlsplit(rendezvous).hostname or "")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world, timeout=TIMEOUT)
    return Mesh(degrees, rank, "cuda" if cuda else "cpu")
