"""A VAE's layers as a GPU likes them; nothing here changes what they compute, but for the last bits.

weights        channels last, so that convolutions run on tensor cores without reordering what goes through them
norms          with the SiLU behind them as one compiled kernel, which reads and writes a picture once
upsampling     in the picture's own dtype: nearest neighbours are copies, which no dtype makes better
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# What modules call the activation behind their own norms.
ACTIVATIONS = ("nonlinearity", "conv_act")
# Graphs of a norm, in all: one for each number of channels, and another for single frames.
RECOMPILE_LIMIT = 256
COMPILERS = ("gcc", "g++", "clang", "clang++")


def speed_up(vae: nn.Module) -> None:
    """All of the above, on a loaded VAE whose layers may have been rebound for ranks already.

    Where there is no C compiler, norms stay as they are.
    """
    channels_last(vae)
    if any(map(shutil.which, COMPILERS)):
        fuse_norms(vae)
    for module in vae.modules():
        if isinstance(module, nn.Upsample) and module.mode.startswith("nearest"):
            layer: Any = module
            layer.forward = MethodType(nn.Upsample.forward, module)


def channels_last(vae: nn.Module) -> None:
    """Weights of convolutions with the channels innermost; what goes through them follows."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def fuse_norms(vae: nn.Module) -> int:
    """Norms take along the SiLU that follows them. Those that ranks share (their forward is not their class's) stay.

    Returns:
        How many norms have one now.
    """
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, RECOMPILE_LIMIT)
    compiled: dict[type, Callable[..., Any]] = {}
    count = 0
    for owner in list(vae.modules()):
        for name in ACTIVATIONS:
            norms = [norm for key, norm in owner.named_children() if "norm" in key and _own_forward(norm)]
            if norms and isinstance(getattr(owner, name, None), nn.SiLU):
                for norm in norms:
                    forward = compiled.setdefault(type(norm), _with_silu(type(norm)))
                    norm.forward = MethodType(forward, norm)
                setattr(owner, name, nn.Identity())
                count += len(norms)
    return count


def compile_decoder(vae: Any) -> None:
    """The whole decoder, a graph for each shape and kind of chunk; `seal` ends it."""
    torch.compiler.set_stance("default")
    vae.decoder.forward = torch.compile(vae.decoder.forward, dynamic=False)


def seal() -> None:
    """From now on shapes without a graph run eagerly: no request waits for a compiler."""
    torch.compiler.set_stance("eager_on_recompile")


def _own_forward(module: nn.Module) -> bool:
    return "forward" not in vars(module)


def _with_silu(cls: Any) -> Callable[..., Any]:
    def forward(norm: Any, x: torch.Tensor) -> torch.Tensor:
        return F.silu(cls.forward(norm, x))

    compiled: Callable[..., Any] = torch.compile(forward, fullgraph=True, dynamic=True)
    return compiled
