"""Applies the features a config asks for, in their one order, and prints what fits what.

A pair that cannot work is refused at start, with the reason; nothing is ignored.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.config import parse
from services.errors import StartupError
from services.families import FAMILIES, load_family
from services.family import DitModel, DitPart, ModelPlan
from services.features import ALWAYS_ON, ORDER, Applied, Beside, BlockRun


@dataclass(frozen=True, slots=True)
class Support:
    """One cell of the matrix; `reason` is empty where the feature works."""

    family: str
    feature: str
    exact: bool
    reason: str


class FeatureSet:
    """The features that are on."""

    def __init__(self, applied: Mapping[str, Applied]) -> None:
        self._applied = dict(applied)

    @property
    def options(self) -> dict[str, str]:
        """Resolved options as JSON, by feature."""
        return {name: applied.options for name, applied in self._applied.items()}

    def seal(self) -> None:
        """Tells every feature that the warm-up is over."""
        for applied in self._applied.values():
            applied.seal()

    def wrap(self, run: BlockRun, beside: Beside) -> BlockRun:
        """The run of a block list with all that features put around it, the first feature's innermost."""
        for applied in self._applied.values():
            run = applied.wrap(run, beside)
        return run

    def metrics(self) -> dict[str, float]:
        """The features' own figures."""
        return {key: value for applied in self._applied.values() for key, value in applied.metrics().items()}


def apply_features(
    model: DitModel, part: DitPart, sections: Mapping[str, Mapping[str, Any]], axes: frozenset[str] = frozenset()
) -> FeatureSet:
    """Acts on the model, with the features that `chosen_features` finds.

    Raises:
        StartupError: as that says, or an option that does not fit the model.
    """
    applied: dict[str, Applied] = {}
    for name, config in chosen_features(part.plan, model.device.type, sections, axes).items():
        try:
            applied[name] = importlib.import_module(ORDER[name]).apply(model, part, config)
        except ValueError as error:
            raise StartupError(str(error)) from error
    return FeatureSet(applied)


def chosen_features(
    plan: ModelPlan, device_type: str, sections: Mapping[str, Mapping[str, Any]], axes: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The configs of features that the sections ask for and of those that are always on, in their order.

    Args:
        axes: as `Mesh.active` has them.

    Raises:
        StartupError: an unknown feature or option, or one that cannot apply here.
    """
    for name in sections:
        if name not in ORDER:
            raise StartupError(f"unknown feature {name!r}: there are {', '.join(ORDER)}")
    wanted: dict[str, Mapping[str, Any]] = {**dict.fromkeys(ALWAYS_ON, {}), **sections}
    active = frozenset(wanted) | axes
    chosen: dict[str, Any] = {}
    for name in ORDER:
        if name not in wanted:
            continue
        feature = importlib.import_module(ORDER[name])
        reason = feature.supports(plan, device_type, active)
        if reason and name not in sections:
            continue
        if reason:
            raise StartupError(f"feature {name!r} cannot be used here: {reason}")
        try:
            chosen[name] = parse(feature.Config, wanted[name], f"features.{name}.")
        except ValueError as error:
            raise StartupError(str(error)) from error
    return chosen


def matrix(device_type: str = "cpu") -> list[Support]:
    """Every family with every feature, as the code knows it."""
    rows = []
    for family in FAMILIES:
        plan = load_family(family).dit.plan
        for name, module in ORDER.items():
            feature = importlib.import_module(module)
            reason = feature.supports(plan, device_type, frozenset({name}))
            rows.append(Support(family, name, feature.EXACT, reason or ""))
    return rows
