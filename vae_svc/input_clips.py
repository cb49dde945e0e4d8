"""The clips of a request, read once for all ranks of a group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist

from services.clip_reader import ClipReading, Frames
from services.errors import ErrorRecord, ServiceError
from services.parallel.mesh import Axis
from services.request import Media


class SharedClips:
    """Clips that rank 0 reads beside its ticks. All ranks look in the same ticks, and see the same.

    Args:
        axis: of the ranks, None for a rank of its own.
    """

    def __init__(self, clips: Sequence[Media], max_frames: int, axis: Axis | None) -> None:
        self._axis = axis
        self._reading = ClipReading(clips, max_frames) if axis is None or not axis.rank else None

    def look(self) -> list[Frames] | None:
        """The frames of each clip, [F, H, W, 3]; None while they are being read.

        Raises:
            ServiceError: as `ClipReading.frames`, on all ranks alike.
        """
        frames: list[Frames] = []
        head = b""
        if self._reading is not None and self._reading.is_done():
            try:
                frames = self._reading.frames()
                head = json.dumps({"shapes": [clip.shape for clip in frames]}).encode()
            except ServiceError as error:
                head = json.dumps({"error": asdict(ErrorRecord.of(error))}).encode()
        size = torch.tensor([len(head)])
        self._share(size)
        if not size.item():
            return None
        text = torch.frombuffer(bytearray(head or int(size)), dtype=torch.uint8)
        answer = json.loads(self._share(text).numpy().tobytes())
        if error_fields := answer.get("error"):
            raise ErrorRecord(**error_fields).error()
        if self._reading is None:
            frames = [np.empty(shape, np.uint8) for shape in answer["shapes"]]
        for clip in frames:
            self._share(torch.from_numpy(clip))
        return frames

    def close(self) -> None:
        """Nobody wants them."""
        if self._reading is not None:
            self._reading.close()

    def _share(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's, in all others' place. On the CPU: it must not wait for the device."""
        if self._axis is not None:
            dist.broadcast(tensor, self._axis.ranks[0], group=self._axis.group)
        return tensor
