"""Renders the Helm chart as `helm install` would, and reads the result."""

from __future__ import annotations

import json
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gateway.config import GatewayConfig
from services.config import StageConfig
from services.server import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/lightloom"
VALUES = sorted((Path(__file__).parent / "values").glob("*.yaml"))
EVERYTHING = Path(__file__).parent / "values/everything.yaml"
RELEASE, NAMESPACE = "pix", "media"
# What `python -m` runs for a stage, and its gRPC service.
STAGES = {"text_encoder_svc": "TextEncoder", "dit_svc": "Dit", "vae_svc": "Vae", "interpolation_svc": "Interpolation"}

Object = dict[str, Any]


def helm(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs the helm that `make .venv/dev` unpacks beside the virtual environment, or the one on the PATH."""
    local = ROOT / ".venv/helm/helm"
    found = str(local) if local.exists() else shutil.which("helm")
    assert found, "helm is missing: run `make .venv/dev`"
    return subprocess.run([found, *words], capture_output=True, text=True, check=False)


def values_named(stem: str) -> Path:
    """One of the sets of values."""
    return next(path for path in VALUES if path.stem == stem)


def template(values: Path, *settings: str, kube_version: str = "1.37.0") -> subprocess.CompletedProcess[str]:
    """`helm template` with a file of values, and with `key=value` settings over it."""
    options = ["--namespace", NAMESPACE, "--kube-version", kube_version, "--values", str(values)]
    return helm("template", RELEASE, str(CHART), *options, *(f"--set={setting}" for setting in settings))


def render(values: Path, *settings: str) -> list[Object]:
    """All objects."""
    result = template(values, *settings)
    assert result.returncode == 0, result.stderr
    return [document for document in yaml.safe_load_all(result.stdout) if document]


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [item for item in objects if item["kind"] in kinds]


def by_name(objects: list[Object], kind: str) -> dict[str, Object]:
    return {item["metadata"]["name"]: item for item in of_kind(objects, kind)}


def pod_templates(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """The name of what makes the pods, and the template: of the workers of a LeaderWorkerSet with `-worker`."""
    for item in of_kind(objects, "Deployment", "StatefulSet"):
        yield item["metadata"]["name"], item["spec"]["template"]
    for item in of_kind(objects, "LeaderWorkerSet"):
        parts = item["spec"]["leaderWorkerTemplate"]
        yield item["metadata"]["name"], parts["leaderTemplate"]
        yield item["metadata"]["name"] + "-worker", parts["workerTemplate"]


def container(pod: Object) -> Object:
    """The one container of a pod template."""
    [found] = pod["spec"]["containers"]
    return found


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector (matchLabels only) takes these labels."""
    assert set(selector) <= {"matchLabels"}, f"unknown kind of selector: {selector}"
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def configs(objects: list[Object]) -> dict[str, dict[str, Any]]:
    """The TOML files of all ConfigMaps, by the ConfigMap's name and the file's."""
    return {
        f"{name}/{file}": tomllib.loads(text)
        for name, item in by_name(objects, "ConfigMap").items()
        for file, text in item["data"].items()
    }


def values_schema() -> Object:
    return json.loads((CHART / "values.schema.json").read_text())


def started_with(objects: list[Object], pod: Object, folder: Path) -> Any:
    """The config that the pod's process makes of its files and arguments, as the process itself reads them."""
    main = container(pod)
    words = list(main["args"])
    for variable in main.get("env", []):
        words = [word.replace(f"$({variable['name']})", "10.0.0.7") for word in words]
    mounts = {mount["name"]: mount["mountPath"] for mount in main["volumeMounts"]}
    maps = by_name(objects, "ConfigMap")
    for volume in pod["spec"]["volumes"]:
        if "configMap" in volume:
            for file, text in maps[volume["configMap"]["name"]]["data"].items():
                (folder / file).write_text(text)
            words = [word.replace(mounts[volume["name"]], str(folder)) for word in words]
    cls: Any = GatewayConfig if main["command"][-1] == "gateway" else StageConfig
    return parse_arguments(cls, "", words)
