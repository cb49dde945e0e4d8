"""Which kernels take how long, by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable

import torch


def kernel_times(
    work: Callable[[], None], device_type: str, count: int, trace: str = ""
) -> list[tuple[str, float, int]]:
    """(name, milliseconds, calls) of the `count` kernels that take longest while `work` runs, which waits for the GPU.

    Args:
        device_type: "cuda"; "cpu" for rehearsals, where times on a device are 0.
        trace: file for the timeline, for Perfetto.
    """
    activity = torch.profiler.ProfilerActivity.CUDA if device_type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        work()
    if trace:
        profile.export_chrome_trace(trace)
    rows = [(row.key[:80], row.self_device_time_total / 1000, row.count) for row in profile.key_averages()]
    return sorted(rows, key=lambda row: -row[1])[:count]
