"""What a GPU and its links do in a second, as `lightloom plan` counts on it; a TOML file may say otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from services.config import parse, read_toml
from services.errors import StartupError

# Between these lengths of a sequence the rate of attention grows, in proportion to the logarithm.
SHORT_TOKENS, LONG_TOKENS = 4400, 33000


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The defaults are for H100 80 GB with NVLink.

    Attributes:
        matmul_tflops: bf16, 8192 cubed; measured on one H100, torch 2.11.
        attention_short_tflops, attention_long_tflops: cuDNN, heads of 128, 4.4k and 33k tokens; measured likewise.
        compute_share: of those that compiled forwards of diffusers reached on it, the time of all else included:
            0.69 Qwen-Image, 0.74 FLUX.1-dev, 0.87 Wan 2.2 14B.
        all_to_all_gb_s, all_reduce_gb_s, all_gather_gb_s, send_gb_s: 10^9 bytes that a rank sends in a second, at 503
            MB; measured on two H100 by `benchmarks/collectives.py`.
        ring_gb_s: 10^9 bytes of keys and values that a rank passes on in each second that ring attention takes beyond
            its share of one GPU's. Measured with Qwen-Image at 1024x1024 on two H100, with CUDA graphs.
        collective_us: what each collective takes besides, in microseconds; assumed.
        reserve_gib: of each GPU for the driver, NCCL, workspaces and what the allocator cannot use; assumed.
    """

    matmul_tflops: float = 787.0
    attention_short_tflops: float = 555.0
    attention_long_tflops: float = 605.0
    compute_share: float = 0.75
    all_to_all_gb_s: float = 198.0
    all_reduce_gb_s: float = 274.0
    all_gather_gb_s: float = 230.0
    send_gb_s: float = 272.0
    ring_gb_s: float = 172.0
    collective_us: float = 20.0
    reserve_gib: float = 3.0

    def compute_s(self, matmul_flops: int, attention_flops: int, tokens: int) -> float:
        """Seconds for these operations; attention is over `tokens`."""
        low, high = self.attention_short_tflops, self.attention_long_tflops
        along = math.log(max(tokens, 1) / SHORT_TOKENS) / math.log(LONG_TOKENS / SHORT_TOKENS)
        attention = low + (high - low) * min(1.0, max(0.0, along))
        return (matmul_flops / self.matmul_tflops + attention_flops / attention) / 1e12 / self.compute_share

    def wire_s(self, kind: str, sent_bytes: int, calls: int) -> float:
        """Seconds for collectives of a kind, as `services/parallel` names kinds."""
        gb_s = {
            "all_to_all": self.all_to_all_gb_s,
            "all_to_all_uneven": self.all_to_all_gb_s,
            "all_reduce": self.all_reduce_gb_s,
            "ring": self.ring_gb_s,
            "pipeline": self.send_gb_s,
        }.get(kind, self.all_gather_gb_s)
        return sent_bytes / gb_s / 1e9 + calls * self.collective_us / 1e6


def read_rates(path: Path | None) -> Rates:
    """From a TOML file with some of the fields; None: the defaults.

    Raises:
        StartupError: no such file, unknown keys, or numbers that are not above 0.
    """
    if path is None:
        return Rates()
    rates = parse(Rates, read_toml(path), "rates.")
    for field in fields(Rates):
        value = getattr(rates, field.name)
        if not (math.isfinite(value) and value > 0):
            raise StartupError(f"{path}: {field.name} is {value}: it must be a number above 0")
    return rates
