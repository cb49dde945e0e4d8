"""The features and the one order in which they apply. Imports nothing heavy.

A feature is one file that acts on any family through its `ModelPlan`. Each module has:

    NAME: str                                          the section `[features.NAME]` of a config
    EXACT: bool                                        whether results stay bit for bit
    Config                                             frozen dataclass of its options
    supports(plan, device_type, active) -> str | None  the reason why it cannot apply: a number or a theorem
    apply(model, part, config) -> Applied              acts on a loaded DitModel

`active` is the set of names of all features that are on. A refusal stops the service at start-up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _nothing() -> None:
    """Nothing is to be done after the warm-up."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What a feature did.

    Attributes:
        options: the resolved options as JSON, for Describe.
        seal: called once after the warm-up, before the first request.
        metrics: plain figures, read while serving.
    """

    options: str
    seal: Callable[[], None] = _nothing
    metrics: Callable[[], dict[str, float]] = dict


# Load-time features, in the order of application: attention is chosen before blocks are compiled, so that the
# compiled graph holds the kernel.
ORDER = {
    "attention": "services.features.attention",
    "compile": "services.features.compile",
}

# On with their defaults where a config has no section for them and the family allows them: they cost nothing and
# approximate nothing. The others are asked for.
ALWAYS_ON = ("attention",)
