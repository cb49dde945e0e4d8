"""What `lightloom plan` is asked, checked before anything slow is imported: a wrong option is answered at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.errors import StartupError

GIB = 2**30
MAX_GPUS = 64
MAX_TEXT_TOKENS = 4096
UNITS = {"GIB": GIB, "GB": 10**9}


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asks for.

    Attributes:
        memory: of each GPU, as `parse_memory` takes it; empty: that of this machine's GPU.
        size: WIDTHxHEIGHT in pixels; empty: the model's own.
    """

    model: str
    family: str
    preset: str
    gpus: int
    memory: str
    size: str
    frames: int | None
    guidance: float | None
    text_tokens: int
    offload_experts: bool = False
    expert: str = ""

    def check(self) -> None:
        """Whether each value can be read, whatever the model.

        Raises:
            StartupError: says which cannot, and how to write it.
        """
        if not 1 <= self.gpus <= MAX_GPUS:
            raise StartupError(f"--gpus is {self.gpus}: it must be between 1 and {MAX_GPUS}")
        if not 1 <= self.text_tokens <= MAX_TEXT_TOKENS:
            raise StartupError(f"--text-tokens is {self.text_tokens}: it must be between 1 and {MAX_TEXT_TOKENS}")
        if self.memory:
            parse_memory(self.memory)
        width, _, height = self.size.partition("x")
        if self.size and not (width.isdigit() and height.isdigit()):
            raise StartupError(f"--size is {self.size!r}: write WIDTHxHEIGHT, for example 1024x1024")
        if self.model.startswith("random:") and not (self.family and self.preset):
            raise StartupError(f"{self.model} has no shape of its own: give --family and --preset")


def parse_memory(text: str) -> int:
    """Bytes of "80GiB" or "80GB".

    Raises:
        StartupError: says how to write it.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB)", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise StartupError(f"--memory is {text!r}: write it as 80GiB or 80GB")
    return round(float(match[1]) * UNITS[match[2].upper()])
