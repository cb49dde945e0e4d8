"""The Helm chart: linted, rendered with several sets of values, every object checked, wrong values refused."""

from __future__ import annotations

import copy
import importlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.config import EngineSection, ModelSection, ParallelSection, ServiceSection, parse
from services.errors import StartupError
from services.features import ORDER
from services.parallel.degrees import Degrees
from services.request import InterpolationLimits, Limits
from tests.deploy.chart import (
    CHART,
    EVERYTHING,
    STAGES,
    VALUES,
    Object,
    container,
    helm,
    of_kind,
    pod_templates,
    render,
    started_with,
    template,
    values_schema,
)
from tests.deploy.schemas import Invalid, check


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_helm_finds_nothing_to_complain_of(values: Path) -> None:
    result = helm("lint", "--strict", str(CHART), "--values", str(values))
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_object_fits_the_schema_of_its_kind(objects: list[Object]) -> None:
    for item in objects:
        check(item, "1.37")


def test_the_oldest_kubernetes_that_the_chart_allows_takes_it_too(everything: list[Object]) -> None:
    oldest = yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"].removeprefix(">=").removesuffix("-0")
    for item in everything:
        check(item, oldest)
    assert template(EVERYTHING, kube_version="1.29.0").returncode != 0


@pytest.mark.parametrize(
    ("kind", "change", "complaint"),
    [
        ("Deployment", lambda item: item["spec"].update(replcas=1), "replcas"),
        ("ScaledObject", lambda item: item["spec"]["scaleTargetRef"].update(knd="x"), "knd"),
        ("ScaledObject", lambda item: item["spec"].update(maxReplicaCount="four"), "four"),
        ("ServiceMonitor", lambda item: item["spec"]["endpoints"][0].update(prt="x"), "prt"),
        ("LeaderWorkerSet", lambda item: item["spec"]["leaderWorkerTemplate"].update(restartPolicy="Never"), "Never"),
        (
            "LeaderWorkerSet",
            lambda item: container(item["spec"]["leaderWorkerTemplate"]["workerTemplate"]).update(imge="x"),
            "imge",
        ),
        ("ConfigMap", lambda item: item.update(kind="ConfgMap"), "no validator knows v1 ConfgMap"),
        ("ScaledObject", lambda item: item.update(apiVersion="keda.sh/v1"), "no validator knows keda.sh/v1"),
    ],
)
def test_what_no_api_server_takes_is_found(everything: list[Object], kind: str, change: Any, complaint: str) -> None:
    item = copy.deepcopy(of_kind(everything, kind)[0])
    check(item, "1.37")
    change(item)
    with pytest.raises(Invalid, match=complaint):
        check(item, "1.37")


def test_services_accept_their_configs(objects: list[Object], tmp_path: Path) -> None:
    for _, pod in pod_templates(objects):
        module = container(pod)["command"][-1]
        if module not in (*STAGES, "gateway"):
            continue
        config = started_with(objects, pod, tmp_path)
        if module == "gateway":
            continue
        parse(InterpolationLimits if module == "interpolation_svc" else Limits, config.limits, "limits.")
        assert Degrees.of(config.parallel).world >= 1
        for name, options in config.features.items():
            parse(importlib.import_module(ORDER[name]).Config, options, f"features.{name}.")


def test_a_key_that_the_chart_lets_through_and_the_service_does_not_know_is_found(tmp_path: Path) -> None:
    values = yaml.safe_load(EVERYTHING.read_text())
    values["gateway"]["config"] = {"gateway": {"lease": 5}}
    made = render(written(values, tmp_path))
    with pytest.raises(StartupError, match="unknown config key gateway.lease"):
        test_services_accept_their_configs(made, tmp_path)


def written(values: Object, folder: Path) -> Path:
    path = folder / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_schema_of_values_has_the_keys_of_the_services() -> None:
    """What the chart itself sets is left out."""
    definitions = values_schema()["$defs"]
    known = {
        "service": (ServiceSection, {"host", "port", "metrics_port", "health_port", "name"}),
        "model": (ModelSection, {"name"}),
        # By models.NAME.experts.
        "engine": (EngineSection, {"expert"}),
        "parallel": (ParallelSection, {"hosts", "leader_address", "agent_token_file"}),
        "limits": (Limits, set()),
        "interpolationModel": (ModelSection, {"name", "family", "preset"}),
        "interpolationLimits": (InterpolationLimits, set()),
    }
    for name, (cls, own) in known.items():
        assert set(definitions[name]["properties"]) | own == {field.name for field in fields(cls)}, name


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("gatway", {}, "gatway"),
        ("models.wan.model.sorce", "x", "sorce"),
        ("models.wan.stages.dit.service.port", 1, "port"),
        ("models.wan.stages.dit.service.max_in_flight", 0, "max_in_flight"),
        ("models.wan.stages.vae.parallel.ulysses_degree", 2, "parallel"),
        ("models.wan.stages.dit.autoscaling.minReplicas", 0, "minReplicas"),
        ("models.wan.limits.max_pixel", 5, "max_pixel"),
        ("models.wan.experts.low_noise.replica", 2, "replica"),
        ("models.wan.experts.low-noise", {}, "low-noise"),
        ("models.wan.experts.low_noise.engine.offload_experts", True, "offload_experts does not go with experts"),
        ("models.a-name-of-32-characters-exactly1", {"model": {"source": "x"}}, "longer than 52 characters"),
        ("interpolation.model.preset", "x", "preset"),
        ("interpolation.limits.max_exponent", 2, "max_exponent"),
        ("interpolation.hosts", 2, "hosts"),
        ("models.Wan", {"model": {"source": "x"}}, "Wan"),
        ("gateway.config.redis.url", "redis://:secret@r:6379", "redis"),
        ("redis.existingSecret", "", "name a Secret with the key `url`"),
        ("models.wan.stages.dit.agentTokenSecret", "", "needs stages.dit.agentTokenSecret"),
        ("keda.prometheusAddress", "", "needs the address of Prometheus"),
        ("tls.stageSecret", "lightloom-stage-tls", "go together"),
        ("tls.frontSecret", "lightloom-front-tls", "serviceMonitor.gatewayTlsConfig"),
        ("tls.certificate", "x", "certificate"),
        ("tls.clientCertificates", True, "ca.crt of tls.frontSecret"),
        ("redis.clientCertificate", True, "redis.tlsSecret, which is empty"),
        ("redis.internal.tlsSecret", "lightloom-redis-tls", "needs redis.tlsSecret"),
        ("redis.internal.maxmemoryMiB", "lots", "maxmemory"),
        ("artifacts.s3.bucket", "s3://pictures", "bucket"),
        ("artifacts.s3.endpointUrl", "https://key:secret@minio", "endpointUrl"),
        ("artifacts.s3.environment.AWS_SECRET_ACCESS_KEY", "x", "AWS_SECRET_ACCESS_KEY"),
        ("gateway.config.tenants", {"acme": 0}, "acme"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_made(
    tmp_path: Path, path: str, value: object, complaint: str
) -> None:
    values = yaml.safe_load(EVERYTHING.read_text())
    place = values
    *sections, key = path.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value
    result = template(written(values, tmp_path))
    assert result.returncode != 0
    assert complaint in result.stderr


def test_the_notes_name_the_models() -> None:
    # `helm template` leaves the notes out.
    made = helm("install", "pix", str(CHART), "--values", str(EVERYTHING), "--dry-run=client")
    assert made.returncode == 0, made.stderr
    assert "Models: wan." in made.stdout
