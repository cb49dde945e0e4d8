"""What the chart makes, each object with the others: names, ports, selectors, policies, times, secrets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.core import Metric

from gateway.backlog import families
from gateway.config import GatewaySection
from gateway.dispatch import HAND_BACK_S
from services.server import LIVE
from tests.deploy.chart import (
    NAMESPACE,
    STAGES,
    Object,
    by_name,
    configs,
    container,
    of_kind,
    pod_templates,
    render,
    selects,
    started_with,
    values_named,
)


def test_containers_are_confined_and_bounded(objects: list[Object]) -> None:
    for name, pod in pod_templates(objects):
        main, security = container(pod), pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] and security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["spec"]["automountServiceAccountToken"] is False, name
        confined = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert main["securityContext"] == confined, name
        assert main["resources"]["limits"]["memory"] and main["resources"]["requests"]["cpu"], name
        _, _, tag = main["image"].rpartition("/")[2].partition(":")
        assert tag and tag != "latest", name


def test_pods_start_and_stop_in_their_own_time(objects: list[Object], tmp_path: Path) -> None:
    for name, pod in pod_templates(objects):
        main = container(pod)
        module = main["command"][-1]
        if module not in (*STAGES, "gateway"):
            continue
        config = started_with(objects, pod, tmp_path)
        section = config.gateway if module == "gateway" else config.service
        port = section.grpc_port if module == "gateway" else section.port
        health_port = section.health_port
        service = f"lightloom.v1.{STAGES.get(module, 'Gateway')}"
        ready, live = ({"grpc": {"port": health_port or port, "service": which}} for which in (service, LIVE))
        # The kubelet speaks no TLS to gRPC.
        assert bool(health_port) == config.tls.on, name
        startup = main["startupProbe"]
        assert asked(startup) == asked(main["readinessProbe"]) == ready, name
        assert asked(main["livenessProbe"]) == live, name
        pause_s, grace_s = (
            main["lifecycle"]["preStop"]["sleep"]["seconds"],
            pod["spec"]["terminationGracePeriodSeconds"],
        )
        if module != "gateway":
            assert startup["failureThreshold"] * startup["periodSeconds"] > section.start_timeout_s, name
            assert grace_s > pause_s + section.drain_timeout_s, name
        else:
            assert grace_s > pause_s + section.drain_s + HAND_BACK_S, name
        assert {port, getattr(section, "http_port", None) or section.metrics_port, health_port or port} == {
            entry["containerPort"] for entry in main["ports"]
        }, name


@pytest.mark.parametrize("own", [(), ("gateway.config.gateway.max_queued_bytes=1000",)])
def test_what_may_wait_fits_into_the_redis_of_the_chart(tmp_path: Path, own: tuple[str, ...]) -> None:
    made = render(values_named("processes"), "redis.internal.maxmemoryMiB=1000", *own)
    pods = dict(pod_templates(made))
    arguments = container(pods["pix-lightloom-redis"])["args"]
    assert arguments[arguments.index("--maxmemory") + 1] == "1000mb"
    section = started_with(made, pods["pix-lightloom-gateway"], tmp_path).gateway
    # There are two models.
    assert section.max_queued_bytes == (1000 if own else 200 * 2**20)


def asked(probe: Object) -> Object:
    """What a probe asks, without its times."""
    return {kind: probe[kind] for kind in ("grpc", "httpGet", "exec", "tcpSocket") if kind in probe}


def test_ranks_of_a_group_outlive_the_drain_of_their_leader(everything: list[Object], tmp_path: Path) -> None:
    pods = dict(pod_templates(everything))
    leader, worker = pods["pix-lightloom-dit-wan"], pods["pix-lightloom-dit-wan-worker"]
    config = started_with(everything, leader, tmp_path)
    words = container(worker)["args"]
    assert float(words[words.index("--drain-timeout-s") + 1]) == config.service.drain_timeout_s
    assert worker["spec"]["terminationGracePeriodSeconds"] == leader["spec"]["terminationGracePeriodSeconds"]
    # Each worker by the name that LeaderWorkerSet gives it, at the port where its agent listens.
    assert config.parallel.hosts == tuple(f"10.0.0.7-{index}.pix-lightloom-dit-wan:50100" for index in (1, 2))
    assert words[words.index("--listen") + 1] == "0.0.0.0:50100"
    assert config.parallel.agent_token_file == words[words.index("--token-file") + 1]


def test_gateways_find_all_stages_by_names_that_exist(objects: list[Object], tmp_path: Path) -> None:
    pods = dict(pod_templates(objects))
    services = by_name(objects, "Service")
    stages = started_with(objects, pods["pix-lightloom-gateway"], tmp_path).stages
    there = "pix-lightloom-interpolation" in pods
    assert bool(stages.interpolation) == there, "a name that leads nowhere"
    for stage in ("text_encoder", "dit", "vae", *(["interpolation"] if there else [])):
        name, _, port = getattr(stages, stage).removeprefix("dns:///").partition(":")
        assert services[name]["spec"]["clusterIP"] == "None"
        # DNS leads to the pod's own port.
        [behind] = {
            entry["containerPort"]
            for pod in pods.values()
            if selects({"matchLabels": services[name]["spec"]["selector"]}, pod["metadata"]["labels"])
            for entry in container(pod)["ports"]
            if entry["name"] == "grpc"
        } or {int(port)}
        assert int(port) == behind


def test_services_and_budgets_select_pods_that_have_their_ports(objects: list[Object]) -> None:
    pods = [pod for _, pod in pod_templates(objects)]
    stages = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods}
    for service in of_kind(objects, "Service"):
        selected = [
            pod for pod in pods if selects({"matchLabels": service["spec"]["selector"]}, pod["metadata"]["labels"])
        ]
        assert bool(selected) == (service["metadata"]["labels"]["app.kubernetes.io/component"] in stages)
        for pod in selected:
            names = {entry["name"] for entry in container(pod)["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= names, service["metadata"]["name"]
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert any(selects(budget["spec"]["selector"], pod["metadata"]["labels"]) for pod in pods)
    for monitor in of_kind(objects, "ServiceMonitor"):
        [service] = [
            item
            for item in of_kind(objects, "Service")
            if selects(monitor["spec"]["selector"], item["metadata"]["labels"])
        ]
        assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_selectors_of_workloads_take_their_own_pods_only(objects: list[Object]) -> None:
    pods = list(pod_templates(objects))
    for item in of_kind(objects, "Deployment", "StatefulSet"):
        taken = [name for name, pod in pods if selects(item["spec"]["selector"], pod["metadata"]["labels"])]
        assert taken == [item["metadata"]["name"]]


def test_volumes_name_what_exists_and_secrets_stay_secret(objects: list[Object]) -> None:
    assert not of_kind(objects, "Secret"), "secrets are the user's, never the chart's"
    maps, claims = by_name(objects, "ConfigMap"), by_name(objects, "PersistentVolumeClaim")
    for name, pod in pod_templates(objects):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        own = {"data"} if name.endswith("-redis") else set()
        assert {mount["name"] for mount in container(pod)["volumeMounts"]} == set(volumes) | own, name
        for volume in volumes.values():
            assert volume.get("configMap", {"name": None})["name"] in (None, *maps), name
            assert volume.get("persistentVolumeClaim", {"claimName": "models"})["claimName"] in (
                *claims,
                "models",
                "shared-artifacts",
            )
            # Readable by the group that the process runs in, by nobody else.
            assert volume.get("secret", {"defaultMode": 0o440})["defaultMode"] == 0o440, name
        assert not any(
            "valueFrom" in entry and "secretKeyRef" in entry["valueFrom"] for entry in container(pod).get("env", [])
        )
        mounted = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in container(pod)["volumeMounts"]}
        for path in files_named(objects, pod):
            folder, _, file = path.rpartition("/")
            volume = mounted[folder]
            there = (
                maps[volume["configMap"]["name"]]["data"]
                if "configMap" in volume
                else [item["path"] for item in volume["secret"]["items"]]
            )
            assert file in there, (name, path)
        wanted = {volume["secret"]["secretName"] for volume in volumes.values() if "secret" in volume}
        assert (name.endswith("-gateway") or len(wanted) <= 2) and all(wanted), name
    for name, table in configs(objects).items():
        assert "url" not in table.get("redis", {}), name
        assert not {"password", "token", "secret"} & set(json.dumps(table).replace('"', " ").split()), name


def files_named(objects: list[Object], pod: Object) -> set[str]:
    """Files of Secrets and ConfigMaps that a pod's arguments, variables and configs name."""
    main = container(pod)
    texts = [*main["args"], *(entry.get("value", "") for entry in main.get("env", []))]
    for volume in pod["spec"]["volumes"]:
        if "configMap" in volume:
            texts += by_name(objects, "ConfigMap")[volume["configMap"]["name"]]["data"].values()
    return {path for text in texts for path in re.findall(r"/etc/lightloom[^\s\",]*/[^\s\",]+", text)}


def test_accounts_exist_and_only_the_gateways_may_have_a_role(objects: list[Object]) -> None:
    accounts = by_name(objects, "ServiceAccount")
    for name, pod in pod_templates(objects):
        account = accounts[pod["spec"]["serviceAccountName"]]
        assert account["automountServiceAccountToken"] is False
        assert name.endswith("-gateway") or "annotations" not in account["metadata"], name


def test_certificates_reach_every_process_and_nothing_stays_in_plain_text(tmp_path: Path) -> None:
    objects = render(values_named("secured"))
    pods = dict(pod_templates(objects))
    gateway = started_with(objects, pods["pix-lightloom-gateway"], tmp_path)
    assert gateway.stage_tls.server_name == "stage.lightloom"
    assert all(section.cert and section.key for section in (gateway.tls, gateway.stage_tls, gateway.redis.tls))
    assert gateway.stage_tls.ca and gateway.redis.tls.ca
    assert (gateway.store.path, gateway.store.endpoint_url) == (
        "s3://pictures/some/prefix",
        "https://minio.storage:9000",
    )
    assert not of_kind(objects, "PersistentVolumeClaim")
    assert gateway.tenants == {"acme": 2.0, "acme.com": 3.5}
    for name, pod in pods.items():
        if name.endswith("-demo"):
            stage = started_with(objects, pod, tmp_path)
            # With a CA, a client without a certificate is refused.
            assert stage.tls.cert and stage.tls.key and stage.tls.ca, name
    ports = {port["name"]: port for port in by_name(objects, "Service")["pix-lightloom-gateway"]["spec"]["ports"]}
    assert ports["http"]["port"] == 443 and {port["appProtocol"] for port in ports.values()} == {"https"}
    [monitor] = [item for item in of_kind(objects, "ServiceMonitor") if item["metadata"]["name"].endswith("-gateway")]
    assert monitor["spec"]["endpoints"][0]["scheme"] == "https" and monitor["spec"]["endpoints"][0]["tlsConfig"]


def test_autoscaled_stages_have_a_target_without_replicas_and_figures_that_gateways_have(
    everything: list[Object],
) -> None:
    exported: dict[str, Metric] = {family.name: family for family in families([])}
    assert len(of_kind(everything, "ScaledObject")) == 4
    for item in of_kind(everything, "ScaledObject"):
        target = item["spec"]["scaleTargetRef"]
        found = by_name(everything, target["kind"])[target["name"]]
        assert found["apiVersion"] == target["apiVersion"]
        assert "replicas" not in found["spec"], "helm upgrade would undo what the autoscaler did"
        for trigger in item["spec"]["triggers"]:
            query = trigger["metadata"]["query"]
            metric, _, labels = query.removeprefix("max(").removesuffix("})").partition("{")
            assert metric in exported
            chosen = dict(pair.split("=") for pair in labels.replace('"', "").split(","))
            assert chosen.pop("namespace") == NAMESPACE
            assert set(chosen) <= set(exported[metric]._labelnames)
            # The interpolator is that of all models.
            assert chosen["model"] == ("" if chosen["stage"] == "interpolation" else "wan")
            assert trigger["metadata"]["ignoreNullValues"] == "false"


def allowed(objects: list[Object], source: Object, target: Object, port: int) -> bool:
    """Whether the policies let one pod of the release call another at a port."""
    policies = of_kind(objects, "NetworkPolicy")
    leaves, enters = source["metadata"]["labels"], target["metadata"]["labels"]
    names = {entry["name"]: entry["containerPort"] for entry in container(target)["ports"]}
    return all(
        any(
            any(_peer(peer, other) for peer in rule.get(side, [{}]))
            and any(names.get(entry["port"], entry["port"]) == port for entry in rule.get("ports", [{"port": port}]))
            for policy in policies
            if selects(policy["spec"]["podSelector"], own)
            for rule in policy["spec"].get(direction, [])
        )
        for direction, side, own, other in (("egress", "to", leaves, enters), ("ingress", "from", enters, leaves))
    )


def _peer(peer: Object, labels: dict[str, str]) -> bool:
    if "ipBlock" in peer or "namespaceSelector" in peer:
        return False
    return selects(peer.get("podSelector", {}), labels)


def test_policies_let_through_what_the_cluster_says_to_itself_and_nothing_else(everything: list[Object]) -> None:
    pods = {name.removeprefix("pix-lightloom-"): pod for name, pod in pod_templates(everything)}
    needed = {
        ("gateway", "text-encoder-wan", 50051),
        ("gateway", "dit-wan", 50051),
        ("gateway", "vae-wan", 50051),
        ("gateway", "interpolation", 50051),
        ("gateway", "redis", 6379),
    }
    # A group's ranks reach each other at every port.
    group = [(one, other) for one in ("dit-wan", "dit-wan-worker") for other in ("dit-wan", "dit-wan-worker")]
    for source in pods:
        for target in pods:
            for port in (50051, 8081, 8080, 9090, 6379, 50100, 41000):
                wanted = (source, target, port) in needed or (source, target) in group
                # Clients of the gateway are all pods of the namespace, but those of the release have no way out to it.
                assert allowed(everything, pods[source], pods[target], port) == wanted, (source, target, port)


def test_each_stage_has_replicas_of_its_own() -> None:
    objects = render(values_named("two_models"))
    replicas = {name: item["spec"].get("replicas") for name, item in by_name(objects, "Deployment").items()}
    assert replicas == {
        "pix-lightloom-gateway": 2,
        "pix-lightloom-text-encoder-qwen-image": 1,
        "pix-lightloom-dit-qwen-image": 3,
        "pix-lightloom-vae-qwen-image": 2,
        "pix-lightloom-text-encoder-flux-dev": 1,
        "pix-lightloom-dit-flux-dev": None,
        "pix-lightloom-vae-flux-dev": 2,
    }


def test_each_expert_has_denoisers_of_its_own_and_what_the_model_s_denoisers_have(tmp_path: Path) -> None:
    objects = render(values_named("experts"))
    pods = dict(pod_templates(objects))
    held = {name: container(pod) for name, pod in pods.items() if "dit" in name}
    name = "pix-lightloom-dit-wan"
    assert set(held) == {f"{name}-high-noise", f"{name}-low-noise", f"{name}-low-noise-worker"}
    for expert, ranks in (("high_noise", 1), ("low_noise", 2)):
        config = started_with(objects, pods[f"{name}-{expert.replace('_', '-')}"], tmp_path)
        assert (config.model.name, config.model.source) == ("wan", "/models/wan")
        assert (config.engine.expert, config.engine.max_batch, config.parallel.ulysses_degree) == (expert, 2, ranks)
    assert {main["resources"]["limits"]["nvidia.com/gpu"] for main in held.values()} == {1}
    # A worker lends its GPU to whoever leads it.
    assert pods[f"{name}-low-noise-worker"]["metadata"]["labels"]["lightloom/group"] == f"{name}-low-noise"
    [scaled] = of_kind(objects, "ScaledObject")
    assert scaled["spec"]["scaleTargetRef"]["name"] == f"{name}-low-noise"
    assert all('model="wan",expert="low_noise"' in each["metadata"]["query"] for each in scaled["spec"]["triggers"])


def test_gateway_settings_reach_the_gateway(everything: list[Object], tmp_path: Path) -> None:
    config = started_with(everything, dict(pod_templates(everything))["pix-lightloom-gateway"], tmp_path)
    assert config.gateway == GatewaySection(host="0.0.0.0", lease_s=5.0, max_queued=500)
