"""What the benchmarks at full size make, and what they report."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

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


def clip_options(description: str | None, steps: int) -> argparse.ArgumentParser:
    """What the benchmarks of a clip of Wan 2.2 are asked: 480p and 81 frames, unless told otherwise."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="random:0", help="weights: random:SEED or a folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--json", type=Path)
    return parser


def note(text: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"  [{time.perf_counter() - _STARTED_S:6.1f} s] {text}", flush=True)
