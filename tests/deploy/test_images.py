"""Dockerfile and compose file, as far as they can be judged without a container engine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from packaging.requirements import Requirement

from gateway.config import GatewayConfig
from gateway.dispatch import HAND_BACK_S
from services.config import StageConfig
from services.server import parse_arguments
from tests.deploy.chart import EVERYTHING, ROOT, STAGES, container, pod_templates, render

DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "Dockerfile"
FILES = ("compose.yaml", "compose.gpu.yaml", "compose.tls.yaml", "compose.s3.yaml")
COMPOSE_SCHEMA = ROOT / ".venv/npm/node_modules/dclint/schemas/compose.schema.json"


def compose(name: str = FILES[0]) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())


def targets() -> dict[str, dict[str, str]]:
    """The Dockerfile's stages: their instructions by name, the last of each kind, those of the stage below included."""
    made: dict[str, dict[str, str]] = {}
    for line in DOCKERFILE.read_text().replace("\\\n", " ").splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            below, _, name = rest.partition(" AS ")
            made[name] = current = dict(made.get(below, {}))
        elif word.isupper() and made:
            current[word] = rest
    return made


def test_hadolint_finds_nothing_to_complain_of() -> None:
    program = Path(sys.executable).parent / "hadolint"
    result = subprocess.run([str(program), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_images_run_what_the_chart_runs_as_nobody_in_particular() -> None:
    made = targets()
    for _, pod in pod_templates(render(EVERYTHING)):
        main, security = container(pod), pod["spec"]["securityContext"]
        image = main["image"].rpartition("/")[2].partition(":")[0]
        if main["name"] in ("redis", "agent"):
            continue
        assert json.loads(made[image]["ENTRYPOINT"]) == main["command"]
        assert json.loads(made[image]["CMD"]) == main["args"][:2]
        assert made[image]["USER"] == f"{security['runAsUser']}:{security['runAsGroup']}"
        assert {str(port["containerPort"]) for port in main["ports"]} == set(made[image]["EXPOSE"].split())


def context() -> list[Path]:
    """What the Dockerfile can copy."""
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert next(line for line in lines if not line.startswith("#")) == "*"
    return [ROOT / line[1:] for line in lines if line.startswith("!")]


def test_images_hold_the_code_and_no_weights() -> None:
    files = [file for path in context() for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    # The interpolator's own are part of its code, once they ship.
    files = [file for file in files if file != ROOT / "interpolation_svc/weights.safetensors"]
    assert not [file for file in files if file.suffix in (".safetensors", ".gguf", ".bin", ".pt")]
    assert {path.name for path in context() if path.is_dir()} == {"gateway", "services", "protos", *STAGES}


def test_what_is_installed_from_the_context_is_whole(tmp_path: Path) -> None:
    """Its data files too: scripts for Redis, the page, the protos."""
    for path in context():
        copy = tmp_path / "context" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(tmp_path / "installed"))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(tmp_path / "context")], check=True)
    for path in (path for path in context() if path.is_dir()):
        ours = {file.relative_to(ROOT) for file in path.rglob("*.*") if "__pycache__" not in file.parts}
        ours = {file for file in ours if file.suffix != ".binpb"}
        assert not [file for file in ours if not (tmp_path / "installed" / file).is_file()]


def installed_with(names: list[str]) -> set[str]:
    """These distributions, and all that they need."""
    wanted, present = [Requirement(name) for name in names], set[str]()
    while wanted:
        requirement = wanted.pop()
        present.add(normal(requirement.name))
        for needed in map(Requirement, metadata.requires(requirement.name) or []):
            asked = needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
            )
            if asked and normal(needed.name) not in present:
                wanted.append(needed)
    return present


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_gateway_imports_nothing_that_its_image_lacks() -> None:
    lines = (DEPLOY / "gateway-requirements.txt").read_text().splitlines()
    present = installed_with([line for line in lines if line[0] != "#"])
    absent = [
        module
        for module, owners in metadata.packages_distributions().items()
        if not {normal(name) for name in owners} & (present | {"lightloom"})
    ]
    # A module that is None there cannot be imported.
    code = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:])); import boto3, gateway.__main__, services.probe"
    made = subprocess.run([sys.executable, "-c", code, *absent], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "torch" in absent and made.returncode == 0, made.stderr


@pytest.mark.parametrize("name", FILES)
def test_compose_files_fit_the_specification(name: str) -> None:
    schema = Draft7Validator(json.loads(COMPOSE_SCHEMA.read_text()))
    assert not [f"{list(error.path)}: {error.message}" for error in schema.iter_errors(compose(name))]
    broken = compose(name)
    next(iter(broken["services"].values()))["volums"] = []
    assert list(schema.iter_errors(broken))


def test_services_of_compose_accept_their_configs_and_find_each_other() -> None:
    services, volumes = compose()["services"], compose()["volumes"]
    made = targets()
    for name, service in services.items():
        sources = dict(entry.removesuffix(":ro").rsplit(":", 1) for entry in service["volumes"])
        assert all(source[0] in "./$" or source in volumes for source in sources), name
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        if name == "redis":
            continue
        [config_file] = [source for source, target in sources.items() if target == json.loads(made[name]["CMD"])[1]]
        cls: Any = GatewayConfig if name == "gateway" else StageConfig
        config = parse_arguments(cls, "", ["--config", str(DEPLOY / config_file)])
        probe = service["healthcheck"]["test"]
        module = json.loads(made[service["build"]["target"]]["ENTRYPOINT"])[-1]
        assert probe[-1] == f"lightloom.v1.{STAGES.get(module, 'Gateway')}"
        if name == "gateway":
            assert probe[-2] == f"127.0.0.1:{config.gateway.grpc_port}"
            assert config.redis.url.startswith("redis://redis:")
            assert {getattr(config.stages, stage.removesuffix("_svc")) for stage in STAGES} == {
                f"dns:///{other}:50051" for other in services if other not in ("redis", "gateway")
            }
            assert all(port.startswith("127.0.0.1:") for port in service["ports"])
            assert int(service["stop_grace_period"].removesuffix("s")) > config.gateway.drain_s + HAND_BACK_S
        else:
            assert probe[-2] == f"127.0.0.1:{config.service.port}"
            assert int(service["stop_grace_period"].removesuffix("s")) > config.service.drain_timeout_s
    assert all(set(compose(name)["services"]) <= set(services) for name in FILES[1:])


def test_compose_with_certificates_has_them_where_the_configs_say() -> None:
    base, overlay = compose()["services"], compose("compose.tls.yaml")
    for name, service in overlay["services"].items():
        secrets = {f"/run/secrets/{secret}" for secret in service["secrets"]}
        assert set(service["secrets"]) <= set(overlay["secrets"]), name
        words = [str(word) for word in service.get("command", [])]
        if name == "redis":
            # What it is told without certificates, it is told with them too.
            assert words[: len(base[name]["command"])] == base[name]["command"]
            assert {word for word in words if word.startswith("/run/secrets/")} == secrets
            continue
        [mounted] = [
            entry for entry in service.get("volumes", base[name]["volumes"]) if ".toml:/etc/lightloom/" in entry
        ]
        file = str(DEPLOY / mounted.split(":")[0])
        settings = [word for word in words if word.startswith("--set")]
        cls: Any = GatewayConfig if name == "gateway" else StageConfig
        config = parse_arguments(cls, "", ["--config", file, *settings])
        if name == "gateway":
            assert config.stage_tls.server_name == "stage.lightloom"
            named = {config.redis.url_file}
            sections = [config.redis.tls, config.stage_tls]
        else:
            assert service["healthcheck"]["test"][-2] == f"127.0.0.1:{config.service.health_port}"
            assert words[0].removeprefix("--config=") == mounted.split(":")[1]
            named, sections = set[str](), [config.tls]
        assert named | {path for tls in sections for path in (tls.ca, tls.cert, tls.key)} == secrets, name


def test_compose_with_a_bucket_stores_there() -> None:
    words = compose("compose.s3.yaml")["services"]["gateway"]["command"]
    words = [re.sub(r"\$\{LIGHTLOOM_BUCKET:.*\}", "s3://pictures/some", word) for word in words]
    words = [re.sub(r"\$\{LIGHTLOOM_BUCKET_ENDPOINT:-\}", "http://minio:9000", word) for word in words[1:]]
    for file in ("gateway.toml", "gateway.tls.toml"):
        config = parse_arguments(GatewayConfig, "", ["--config", str(DEPLOY / "config/compose" / file), *words])
        assert (config.store.path, config.store.endpoint_url) == ("s3://pictures/some", "http://minio:9000")
