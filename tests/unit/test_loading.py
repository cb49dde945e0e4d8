"""Where a denoiser's weights are when they have been read."""

from __future__ import annotations

import pytest
import torch

from dit_svc import loading
from services.config import StageConfig, parse
from services.families import load_family
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


def test_random_weights_of_idle_experts_are_the_devices_own(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "placement", lambda _section: (torch.device("meta"), torch.float32))
    family = load_family("wan")
    family.tiny(tmp_path, "t2v", 0)
    table = {"service": {"port": 0}, "model": {"name": "m", "source": "random:0"}, "engine": {"offload_experts": True}}
    source = open_source(str(tmp_path)).without_weights()
    # Nothing can be copied from what stands in the place of a GPU.
    with pytest.raises(NotImplementedError, match="meta tensor"):
        loading._load(parse(StageConfig, table), source, family.dit, None)
