"""Compiled blocks that never recompile in service.

The class's forward is compiled once with dynamic shapes and bound to every block of the class, so all blocks share
two graphs: batch 1, and batch 2 or more. Both are made in the warm-up, which has to bring both. From then on a shape
that no graph fits runs eagerly, is counted, and no request waits for a compiler. On GPUs the GELU of feed-forwards
becomes part of the linear before it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

from services.family import DitModel, DitPart, ModelPlan
from services.features import Applied
from services.linear_gelu import fuse_gelu
from services.parallel.partition import Absent

NAME = "compile"
EXACT = False
RECOMPILE_LIMIT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`mode` is torch.compile's: default, or max-autotune-no-cudagraphs (minutes of warm-up)."""

    mode: str = "default"


@dataclass(slots=True)
class Fallbacks:
    """Block calls that ran eagerly because no graph fitted."""

    count: int = 0


def supports(plan: ModelPlan, device_type: str, active: frozenset[str]) -> str | None:
    """Needs repeated blocks, and a C++ compiler on the CPU."""
    if not plan.block_classes:
        return "the family names 0 repeated block classes"
    if device_type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "compiling for the CPU needs a C++ compiler, and 0 of g++, clang++ are on the PATH"
    return None


def apply(model: DitModel, part: DitPart, config: Config) -> Applied:
    """Rebinds `forward` of every block."""
    settings: Any = torch._dynamo.config
    settings.recompile_limit = RECOMPILE_LIMIT
    # How many tokens go to an expert is known only when they are there; a graph takes such sizes as they come.
    settings.capture_scalar_outputs = True
    # Two sizes that happen to be equal at first must not be taken for one.
    shapes: Any = torch.fx.experimental._config
    shapes.use_duck_shape = False
    # The stance is the process's: a model that was sealed before must not keep this one from being compiled.
    torch.compiler.set_stance("default")
    fallbacks = Fallbacks()
    compiled = {cls: _compiled(cls.forward, config.mode, fallbacks) for cls in part.plan.block_classes}
    for module in model.modules.values():
        for block in part.blocks(module):
            if isinstance(block.module, Absent):
                continue
            if model.device.type == "cuda":
                fuse_gelu(block.module)
            block.module.forward = MethodType(compiled[type(block.module)], block.module)

    def seal() -> None:
        fallbacks.count = 0
        torch.compiler.set_stance("eager_on_recompile")

    return Applied(json.dumps({"mode": config.mode}), seal, lambda: {"dit_recompiles_total": float(fallbacks.count)})


def _compiled(forward: Callable[..., Any], mode: str, fallbacks: Fallbacks) -> Callable[..., Any]:
    def counted(block: Any, *args: Any, **kwargs: Any) -> Any:
        # Traced code has no trace of this line: it runs only where the block runs eagerly.
        if not torch.compiler.is_compiling():
            fallbacks.count += 1
        return forward(block, *args, **kwargs)

    compiled: Callable[..., Any] = torch.compile(counted, fullgraph=True, dynamic=True, mode=mode)
    return compiled
