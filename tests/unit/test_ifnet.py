"""IFNet against what was published: names and shapes of the weight files, and pictures of the published networks.

`ifnet/*.keys` list the tensors of the published files, `ifnet/pictures.json` pixels that the published code made of the
weights and pictures drawn below.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from interpolation_svc.ifnet import V4_6, V4_22_LITE, IFNet, IFNetSpec
from interpolation_svc.weights import load_ifnet
from services.errors import StartupError

FOLDER = Path(__file__).with_name("ifnet")
VERSIONS = {"4.6": V4_6, "4.22.lite": V4_22_LITE}
NARROW = IFNetSpec((16, 12, 8, 8), encodes=True)


def published(version: str) -> dict[str, torch.Tensor]:
    """Tensors under the published names, drawn in the order of the names without their prefix."""
    lines = [line.split() for line in (FOLDER / f"{version}.keys").read_text().splitlines()]
    random, tensors = np.random.RandomState(0), {}
    for name, sizes in sorted(lines):
        shape = tuple(int(size) for size in sizes.split("x"))
        inputs = np.prod(shape[1:]) if len(shape) == 4 and shape[1] > 1 else 100
        tensors[name] = torch.from_numpy(random.standard_normal(shape) * (2 / inputs) ** 0.5).float()
    return tensors


def pictures() -> torch.Tensor:
    coarse = torch.from_numpy(np.random.RandomState(1).random_sample((2, 3, 8, 12))).float()
    return F.interpolate(coarse, (128, 192), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_published_files_load_and_make_the_published_pictures(version: str, tmp_path: Path) -> None:
    torch.save(published(version), tmp_path / "flownet.pkl")
    net = load_ifnet(tmp_path / "flownet.pkl")
    assert net.spec == VERSIONS[version]
    first, second = net.encode_pictures(pictures()).chunk(2)
    for key, pixels in json.loads((FOLDER / "pictures.json").read_text()).items():
        name, scale = key.split()
        if name == version:
            picture = net(first, second, torch.tensor([0.25]), float(scale)).picture()
            torch.testing.assert_close(picture[0, :, 8::32, 8::32].flatten(), torch.tensor(pixels), atol=1e-4, rtol=0)


def test_what_only_training_needed_is_left_in_the_file(tmp_path: Path) -> None:
    teacher = {"module.teacher.conv0.0.0.weight": torch.ones(2), "module.caltime.0.weight": torch.ones(2)}
    torch.save(published("4.6") | teacher, tmp_path / "flownet.pkl")
    assert load_ifnet(tmp_path / "flownet.pkl").spec == V4_6


def test_any_widths_load_from_safetensors_in_a_dtype(tmp_path: Path) -> None:
    save_file(IFNet(NARROW).state_dict(), tmp_path / "net.safetensors")
    net = load_ifnet(tmp_path / "net.safetensors", torch.bfloat16)
    assert net.spec == NARROW
    planes = net.encode_pictures(torch.rand(6, 3, 32, 64))
    estimate = net(planes[:3], planes[3:], torch.tensor([0.25, 0.5, 0.75]))
    assert estimate.picture().shape == (3, 3, 32, 64)
    assert estimate.picture().dtype == estimate.flow.dtype == torch.float32


@pytest.mark.parametrize("scale", [0.25, 0.3, 0.75, 1.5, 4.0])
def test_any_scale_of_the_flow(scale: float) -> None:
    net = IFNet(NARROW)
    first, second = net.encode_pictures(torch.rand(2, 3, 64, 96)).chunk(2)
    assert net(first, second, torch.tensor([0.5]), scale).flow.shape == (1, 4, 64, 96)


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/never",)


def broken_files(folder: Path) -> dict[str, Path]:
    tensors = IFNet(NARROW).state_dict()
    files = {
        "missing": {name: tensor for name, tensor in tensors.items() if name != "block2.lastconv.0.bias"},
        "too many": tensors | {"block1.convblock.8.beta": torch.ones(1, 12, 1, 1)},
        "the shape": tensors | {"encode.cnn3.bias": torch.ones(5)},
        "four blocks": tensors | {"block4.convblock.0.beta": torch.ones(1, 8, 1, 1)},
        "no plain table": {"model": tensors},
        "cannot be read": Payload(),
    }
    for reason, content in files.items():
        torch.save(content, folder / f"{reason}.pkl")
    (folder / "cannot be read.safetensors").write_bytes(b"\xff" * 64)
    (folder / "cannot be read.pth").write_bytes(b"nothing")
    return {path.name: path for path in folder.iterdir()} | {"cannot be read": folder / "absent"}


def test_other_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    for path in broken_files(tmp_path).values():
        with pytest.raises(StartupError, match=path.stem if path.exists() else "cannot be read"):
            load_ifnet(path)
    assert not Path("/tmp/never").exists()
