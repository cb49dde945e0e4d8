"""Every object against the schema of its kind. A kind without a validator is an error, not a warning."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor
from jsonschema import Draft202012Validator

from tests.deploy.chart import Object

LEADER_WORKER_SET = Path(__file__).parent / "leaderworkerset.schema.json"


class Invalid(Exception):
    """An object that an API server would refuse, or that nothing here can judge."""


def check(item: Object, version: str) -> None:
    """Checks an object for a Kubernetes version.

    Raises:
        Invalid: says where and why.
    """
    where = f"{item['kind']} {item['metadata']['name']}"
    custom = _custom_schemas().get((item["apiVersion"], item["kind"]))
    if custom is not None:
        _check_metadata(item, version)
        errors = [f"{where}: {'.'.join(map(str, e.path))}: {e.message}" for e in custom.iter_errors(item)]
        if errors:
            raise Invalid("; ".join(errors))
        for template in _templates(item):
            check({"apiVersion": "v1", "kind": "Pod", **template}, version)
        return
    try:
        kubernetes_validate.validate(item, version, strict=True)
    except kubernetes_validate.SchemaNotFoundError as error:
        raise Invalid(f"{where}: no validator knows {item['apiVersion']} {item['kind']}") from error
    except kubernetes_validate.ValidationError as error:
        raise Invalid(f"{where}: {'.'.join(map(str, error.path))}: {error.message}") from error


def _check_metadata(item: Object, version: str) -> None:
    check({"apiVersion": "v1", "kind": "ConfigMap", "metadata": item["metadata"]}, version)


def _templates(item: Object) -> list[Object]:
    """The pod templates in a LeaderWorkerSet, as the pods that they make."""
    parts = item["spec"].get("leaderWorkerTemplate", {})
    made = [parts[name] for name in ("leaderTemplate", "workerTemplate") if name in parts]
    return [{**part, "metadata": {"name": "pod", **part["metadata"]}} for part in made]


@cache
def _custom_schemas() -> dict[tuple[str, str], Draft202012Validator]:
    leader_worker_set = {
        "type": "object",
        "required": ["spec"],
        "properties": {"spec": json.loads(LEADER_WORKER_SET.read_text())},
    }
    schemas = {
        ("keda.sh/v1alpha1", "ScaledObject"): ScaledObject.model_json_schema(),
        ("monitoring.coreos.com/v1", "ServiceMonitor"): ServiceMonitor.model_json_schema(),
        ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): leader_worker_set,
    }
    return {kind: Draft202012Validator(_strict(schema, top=True)) for kind, schema in schemas.items()}


def _strict(schema: Any, *, top: bool = False) -> Any:
    """The schema with unknown keys forbidden, as `kubectl apply --validate=strict` has it."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        made["additionalProperties"] = False
    if top:
        # Checked apart.
        made["properties"] = {**made["properties"], "apiVersion": True, "kind": True, "metadata": True}
    return made
