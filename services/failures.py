"""What a caller hears of work that failed."""

from __future__ import annotations

import traceback

import torch

from services.errors import OutOfMemory, ServiceError
from services.telemetry import internal_error

# What a device says when it, or its driver context, is lost for the whole process.
_DEVICE_LOST = (
    "cuda error",
    "cudnn_status_execution_failed",
    "cublas_status_execution_failed",
    "nccl error",
    "device-side assert",
    "illegal memory access",
    "unspecified launch failure",
)


def failure_of(error: Exception, request_id: str = "") -> ServiceError:
    """What the caller may know of an exception. Memory of the device that ran out is free again afterwards.

    Raises:
        Exception: the same one, when the device is lost: the process must end.
    """
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        # Calls that have ended hold their tensors as long as the exception lives.
        traceback.clear_frames(error.__traceback__)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return OutOfMemory("the device ran out of memory: ask for a smaller size or fewer frames")
    if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _DEVICE_LOST):
        raise error
    return internal_error(error, request_id)
