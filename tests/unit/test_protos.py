"""The committed stubs are fresh, and the protos keep their rules and their past."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def buf() -> str:
    """The buf binary that `make test` installs beside the virtual environment."""
    local = ROOT / ".venv/npm/node_modules/.bin/buf"
    found = str(local) if local.exists() else shutil.which("buf")
    assert found, "buf is missing: run `make .venv/dev`"
    return found


def test_stubs_are_fresh(tmp_path: Path) -> None:
    protos = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "protos").glob("*.proto"))
    outs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I.", *outs, *protos], cwd=ROOT, check=True)
    made = sorted((tmp_path / "protos").iterdir())
    assert len(made) == 3 * len(protos)
    for path in made:
        assert path.read_text() == (ROOT / "protos" / path.name).read_text(), f"{path.name} is stale: make protos"


def test_buf_lint() -> None:
    result = subprocess.run([buf(), "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_nothing_breaks_the_committed_image() -> None:
    command = [buf(), "breaking", "--against", "protos/image.binpb"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_breaking_change_is_caught(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    types = tmp_path / "protos/types.proto"
    types.write_text(
        types.read_text().replace("uint64 nbytes = 4;\n  fixed32 crc32c", "string nbytes = 4;\n  fixed32 crc32c")
    )
    command = [buf(), "breaking", "--against", "protos/image.binpb"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "nbytes" in result.stdout
