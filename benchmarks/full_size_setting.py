"""What both sides of the full-size benchmark make, and what they report."""

from __future__ import annotations

import time
from dataclasses import dataclass

FAMILY, PRESET = "qwen_image", "qwen-image"

_STARTED_S = time.perf_counter()


@dataclass(frozen=True, slots=True)
class Setting:
    """Square pictures of `side_px` from the weights of `source`: one to warm up, then `runs` measured ones."""

    source: str
    device: str
    side_px: int
    steps: int
    runs: int
    guidance: float = 4.0

    @property
    def family(self) -> str:
        """Only random weights need one."""
        return FAMILY if self.source.startswith("random:") else ""

    @property
    def preset(self) -> str:
        """Only random weights need one."""
        return PRESET if self.source.startswith("random:") else ""


@dataclass(frozen=True, slots=True)
class Timing:
    """What one side took, in seconds; `step` is one scheduler step with both guidance branches."""

    end_to_end_s: float
    step_s: float
    runs: int


def note(text: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"  [{time.perf_counter() - _STARTED_S:6.1f} s] {text}", flush=True)
