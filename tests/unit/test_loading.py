"""Where a denoiser's weights are when they have been read."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_svc import loading
from services.config import StageConfig, parse
from services.families import FAMILIES, load_family
from services.parallel.degrees import Degrees
from services.parallel.mesh import PlannedMesh
from services.weights import open_source

FAMILY = load_family("qwen_image")


@pytest.mark.parametrize(
    ("degrees", "read_to"),
    [(Degrees(replica=2, hsdp_shard=2), "cpu"), (Degrees(cfg=2), "meta")],
)
def test_weights_that_are_sharded_wait_in_the_hosts_memory(degrees, read_to, tmp_path, monkeypatch):
    # In the place of a GPU.
    device = torch.device("meta")
    monkeypatch.setattr(loading, "placement", lambda _section: (device, torch.float32))
    FAMILY.tiny(tmp_path, "t2i", 0)
    config = parse(StageConfig, {"service": {"port": 0}, "model": {"name": "m", "source": str(tmp_path)}})
    model, _ = loading._load(config, open_source(str(tmp_path)), FAMILY.dit, PlannedMesh(degrees, 0))
    assert model.device == device
    assert {weight.device.type for module in model.modules.values() for weight in module.parameters()} == {read_to}


@pytest.mark.parametrize(
    ("degrees", "held_on"),
    [(Degrees(replica=2, hsdp_shard=2), "cpu"), (Degrees(cfg=2), "meta")],
)
def test_random_weights_that_are_sharded_are_drawn_on_the_gpu_all_the_same(degrees, held_on, monkeypatch):
    device = torch.device("meta")
    monkeypatch.setattr(loading, "placement", lambda _section: (device, torch.float32))
    seen = []

    def load(source, device, dtype):
        seen.append((source.drawn_on, device.type))
        return FAMILY.dit.load(source, torch.device("meta"), dtype)

    source = open_source("random:0", family="qwen_image", preset="qwen-image")
    config = parse(StageConfig, {"service": {"port": 0}, "model": {"name": "m", "source": "random:0"}})
    loading._load(config, source, replace(FAMILY.dit, load=load), PlannedMesh(degrees, 0))
    assert seen == [(device, held_on)]


RANDOM = ("normal", "uniform", "rand", "bernoulli", "exponential")
MADE = ("aten.empty", "aten.rand", "aten.ones", "aten.zeros")


class Drawn(TorchDispatchMode):
    """Counts bytes of fresh tensors on the CPU while anybody holds them, and notes the random numbers drawn there."""

    def __init__(self):
        super().__init__()
        self.peak, self.numbers = 0, []
        self._now = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device.type == "cpu":
            if any(word in str(func) for word in RANDOM):
                self.numbers.append((str(func), made.sum().item()))
            if str(func).startswith(MADE):
                self._count(made.untyped_storage())
        else:
            assert not any(word in str(func) for word in RANDOM), f"{func} drew elsewhere"
        return made

    def _count(self, storage):
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size):
        self._now -= size


VARIANTS = [(name, variant) for name in FAMILIES for variant in load_family(name).variants]


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_random_weights_leave_the_device_a_layer_at_a_time_with_the_numbers_of_those_that_stay(
    family, variant, tmp_path
):
    part = load_family(family).dit
    load_family(family).tiny(tmp_path, variant, 0)
    source = open_source(str(tmp_path)).without_weights()
    device, host = torch.device("cpu"), torch.device("meta")
    with Drawn() as staying:
        part.load(source, device, torch.float32)
    # The CPU in the place of a GPU, and tensors without bytes in that of the host.
    with Drawn() as leaving:
        model = part.load(replace(source, drawn_on=device), host, torch.float32)
    assert {weight.device for module in model.modules.values() for weight in module.parameters()} == {host}
    assert leaving.numbers == staying.numbers != []
    blocks = [block.module for module in model.modules.values() for block in part.blocks(module)]
    assert leaving.peak < max(sum(weight.nbytes for weight in block.parameters()) for block in blocks) < staying.peak
