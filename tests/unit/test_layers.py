"""Who may import whom, and how long files may grow: the rules that keep the whole readable in an hour."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("text_encoder_svc", "dit_svc", "vae_svc", "interpolation_svc")
TORCH = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors.torch",
    "services.family",
    "services.weights",
    "services.tensors",
)
GRPC = ("grpc", "protos")
MAX_FILE_LINES = 500

# (files that match, modules they must not import), by path prefix without the suffix.
FORBIDDEN: list[tuple[str, tuple[str, ...]]] = [
    ("gateway/", (*TORCH, "services.families.", "services.features.", *STAGES)),
    ("services/families/", ("services.features", "gateway", "lightloom", "demo", *STAGES, *GRPC)),
    ("services/features/", ("services.families", "gateway", "lightloom", "demo", *STAGES, *GRPC)),
    ("services/", ("gateway", "lightloom", "demo", *STAGES)),
    ("lightloom/client", TORCH),
    *[(f"{stage}/engine", GRPC) for stage in STAGES],
    *[(f"{stage}/__main__", TORCH) for stage in STAGES],
    *[(f"{stage}/servicer", TORCH) for stage in STAGES],
    *[(f"{stage}/", tuple(other for other in STAGES if other != stage) + ("gateway", "lightloom")) for stage in STAGES],
    *[
        (f"services/{name}", TORCH)
        for name in (
            "front",
            "rank_group",
            "server",
            "client",
            "channel",
            "tensor_wire",
            "wire",
            "telemetry",
            "errors",
            "config",
            "request",
            "admission",
            "media",
            "clip_reader",
            "clip_writer",
            "picture_parts",
        )
    ],
]


def sources() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [Path(name) for name in listed if not name.endswith(("_pb2.py", "_pb2_grpc.py")) and (ROOT / name).exists()]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules that a file imports, at any depth of its code, except under TYPE_CHECKING."""
    tree = ast.parse((ROOT / path).read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def within(module: str, rule: str) -> bool:
    return module.startswith(rule) if rule.endswith(".") else module == rule or module.startswith(f"{rule}.")


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_point_inward(path: Path) -> None:
    for prefix, rules in FORBIDDEN:
        if not (
            path.as_posix().startswith(prefix)
            and (prefix.endswith("/") or path.as_posix()[len(prefix) :][:1] in (".", "/", "_"))
        ):
            continue
        for module, line in imports(path):
            broken = [rule for rule in rules if within(module, rule)]
            assert not broken, f"{path}:{line} imports {module}"


def test_families_do_not_know_each_other() -> None:
    for path in sources():
        parts = path.parts
        if parts[:2] != ("services", "families") or path.name == "__init__.py" and len(parts) == 3:
            continue
        own = f"services.families.{parts[2].removesuffix('.py')}"
        for module, line in imports(path):
            foreign = module.startswith("services.families.") and not within(module, own)
            assert not foreign, f"{path}:{line} imports {module}"


def test_features_do_not_name_models() -> None:
    names = ("qwen", "wan", "flux", "hunyuan", "z_image")
    for path in (ROOT / "services/features").glob("*.py"):
        words = path.read_text().lower().replace("_", " ").split()
        assert not set(names) & set(words), f"{path.name} names a model"


@pytest.mark.parametrize("path", sources(), ids=str)
def test_files_stay_short(path: Path) -> None:
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"{path} has {lines} lines: split it along a real seam"
