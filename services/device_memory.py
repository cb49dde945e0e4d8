"""What a stage does when its device runs out of memory."""

from __future__ import annotations

import torch

from services.errors import OutOfMemory, ServiceError


def failure_of(error: ServiceError | torch.OutOfMemoryError) -> ServiceError:
    """What a client hears of a forward that failed. Memory that ran out is free again afterwards."""
    if isinstance(error, ServiceError):
        return error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return OutOfMemory("the device ran out of memory: ask for a smaller size or fewer frames")
