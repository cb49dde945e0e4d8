"""Weight files of IFNet: which architecture one holds is read from the names and shapes of its tensors.

Files are safetensors, or pickles of tensors as published (`flownet.pkl`), opened with `weights_only`: no code of a file
runs. What training alone needed (a teacher, a model of time) may be in a file and is left there.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from interpolation_svc.ifnet import IFNet, IFNetSpec
from services.errors import StartupError

PACKAGED = Path(__file__).with_name("weights.safetensors")
"""The checkpoint that ships with Lightloom (docs/interpolation.md)."""

KNOWN = "IFNet 4.6, 4.22.lite, or one of their kind with other widths"


def load_ifnet(path: Path, dtype: torch.dtype = torch.float32) -> IFNet:
    """The network of a file, on the CPU, ready to run.

    Raises:
        StartupError: the file cannot be read, or holds something else.
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in _read(path).items()}
    spec = _spec(path, tensors)
    with torch.device("meta"):
        net = IFNet(spec)
    wanted = net.state_dict()
    parts = {name.partition(".")[0] for name in wanted}
    given = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in parts}
    if differing := sorted(given.keys() ^ wanted.keys()):
        raise StartupError(f"{path}: these tensors are missing or too many for {KNOWN}: {', '.join(differing[:4])}")
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(wanted[name].shape)}"
            raise StartupError(f"{path}: tensor {name} has the shape {shapes}")
    net.load_state_dict({name: tensor.to(dtype) for name, tensor in given.items()}, assign=True)
    return net.eval().requires_grad_(False)


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise StartupError(f"{path} cannot be read as weights: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise StartupError(f"{path} holds no plain table of tensors")
    return content


def _spec(path: Path, tensors: dict[str, torch.Tensor]) -> IFNetSpec:
    widths = [tensors.get(f"block{level}.convblock.0.beta") for level in range(5)]
    first, second, third, fourth, fifth = widths
    if first is None or second is None or third is None or fourth is None or fifth is not None:
        raise StartupError(f"{path} does not hold {KNOWN}: it has not four blocks")
    sizes = (first.numel(), second.numel(), third.numel(), fourth.numel())
    return IFNetSpec(sizes, encodes=any(name.startswith("encode.") for name in tensors))
