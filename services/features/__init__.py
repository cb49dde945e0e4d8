"""The features and the one order in which they apply. Imports nothing heavy.

A feature is one file that acts on any family through its `ModelPlan`. Each module has:

    NAME: str                                          the section `[features.NAME]` of a config
    EXACT: bool                                        whether results stay bit for bit
    Config                                             frozen dataclass of its options
    supports(plan, device_type, active) -> str | None  the reason why it cannot apply: a number or a theorem
    apply(model, part, config) -> Applied              acts on a loaded DitModel

`active` is the set of names of all features that are on, and of the axes of parallelism that have several ranks. A
refusal stops the service at start-up.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

# Streams through a block list: what enters the first block to what leaves the last.
BlockRun = Callable[[Any], Any]
# What the run in hand depends on besides its streams: plain values.
Beside = Callable[[], Hashable]
# What a feature puts around a run.
Wrap = Callable[[BlockRun, Beside], BlockRun]


def _nothing() -> None:
    """Nothing is to be done after the warm-up."""


def as_it_is(run: BlockRun, _beside: Beside) -> BlockRun:
    """Nothing is to be done around the blocks."""
    return run


@dataclass(frozen=True, slots=True)
class Applied:
    """What a feature did.

    Attributes:
        options: the resolved options as JSON, for Describe.
        seal: called once after the warm-up, before the first request.
        metrics: plain figures, read while serving.
        wrap: what goes around the run of a block list; called once for each list.
    """

    options: str
    seal: Callable[[], None] = _nothing
    metrics: Callable[[], dict[str, float]] = dict
    wrap: Wrap = as_it_is


# Load-time features, in the order of application: attention is chosen before blocks are compiled, so that the
# compiled graph holds the kernel.
ORDER = {
    "attention": "services.features.attention",
    "compile": "services.features.compile",
    "graphs": "services.features.graphs",
}

# On with their defaults where a config has no section for them and the family allows them: they cost nothing and
# approximate nothing. The others are asked for.
ALWAYS_ON = ("attention",)
