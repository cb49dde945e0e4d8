"""Runs rendered pods as processes: the container's command and arguments, with the rendered config, as a kubelet would.

A volume is a folder, and paths into it are rewritten, in arguments and in configs.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from lightloom.redis_server import find_server
from services.config import environment_with_malloc
from services.probe import main as grpc_probe
from tests.cluster.running import wait_for
from tests.deploy.chart import ROOT, Object, by_name, container, pod_templates, selects
from tests.deploy.networks import Network


@dataclass(slots=True)
class Pod:
    """A running pod: `ports` by the number that it has in the container."""

    name: str
    template: Object
    process: subprocess.Popen[bytes]
    log: Path
    address: str
    ports: dict[int, int]

    def probe(self, kind: str) -> bool:
        """One of the rendered probes, of gRPC or HTTP. A pod without one passes."""
        rendered = container(self.template).get(kind, {})
        if "httpGet" in rendered:
            return self._answers(rendered["httpGet"])
        if "grpc" not in rendered:
            return True
        return not grpc_probe(f"{self.address}:{self.ports[rendered['grpc']['port']]}", rendered["grpc"]["service"])

    def _answers(self, asked: Object) -> bool:
        url = f"{asked['scheme'].lower()}://{self.address}:{self.port(asked['port'])}{asked['path']}"
        try:
            # A kubelet checks no certificate either.
            return httpx.get(url, verify=False, timeout=5).is_success
        except httpx.TransportError:
            return False

    def port(self, name: str) -> int:
        """By the name that services use."""
        [number] = [entry["containerPort"] for entry in container(self.template)["ports"] if entry["name"] == name]
        return self.ports[number]

    def figure(self, start: str) -> float:
        """The sum of the figures of the metrics page whose lines start so."""
        port = self.ports.get(9090) or self.ports[8080]
        lines = httpx.get(f"http://{self.address}:{port}/metrics", timeout=30).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start))


class Kubelet:
    """Starts and deletes the pods of a release, and keeps the endpoints of its services.

    Args:
        volumes: folders of Secrets by their names, and of other volumes by the volume's.
    """

    def __init__(self, objects: list[Object], network: Network, folder: Path, volumes: Mapping[str, Path]) -> None:
        self.pods: list[Pod] = []
        self._objects = objects
        self._network = network
        self._folder = folder
        self._volumes = dict(volumes)
        self._templates = dict(pod_templates(objects))
        self._started = 0
        self._places: dict[str, tuple[str, dict[int, int]]] = {}

    def place(self, workload: str, name: str) -> str:
        """Gives a pod its address before it runs."""
        self._places[name] = self._network.join(name, self._templates[workload])
        return self._places[name][0]

    def create(self, workload: str, name: str = "") -> Pod:
        """Another pod of a workload, by default under a name of its own."""
        self._started += 1
        template = self._templates[workload]
        name = name or f"{template['metadata']['labels']['app.kubernetes.io/component']}-{self._started}"
        address, ports = self._places.pop(name, None) or self._network.join(name, template)
        folders = self._mounts(name, template)
        own = self._environment(name, address, template, folders)
        words = self._network.words(name, self._command(template, folders, own))
        log = self._folder / f"{name}.log"
        with log.open("wb") as output:
            environment = environment_with_malloc() | {"PYTHONPATH": str(ROOT)} | own
            process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=output, env=environment)
        self.pods.append(Pod(name, template, process, log, address, ports))
        return self.pods[-1]

    def ready(self, *pods: Pod) -> None:
        """Waits for pods as their readiness probes say, then lets their services lead to them."""

        def passes(pod: Pod) -> bool:
            assert pod.process.poll() is None, pod.log.read_text()
            return pod.probe("readinessProbe")

        for pod in pods:
            wait_for(lambda pod=pod: passes(pod), 180, every_s=0.2)
        self._publish(self.pods)

    def delete(self, *pods: Pod) -> None:
        """As a scale-in does: out of their services, the rendered pause, SIGTERM; they end well and in time."""
        self._publish([pod for pod in self.pods if pod not in pods])
        time.sleep(max(container(pod.template)["lifecycle"]["preStop"]["sleep"]["seconds"] for pod in pods))
        for pod in pods:
            pod.process.send_signal(signal.SIGTERM)
        for pod in pods:
            assert pod.process.wait(pod.template["spec"]["terminationGracePeriodSeconds"]) == 0, pod.log.read_text()
            self.pods.remove(pod)

    def stop(self) -> None:
        """Ends what still runs."""
        for pod in self.pods:
            pod.process.terminate()
        for pod in self.pods:
            try:
                pod.process.wait(20)
            except subprocess.TimeoutExpired:
                pod.process.kill()
                pod.process.wait()

    def _publish(self, pods: list[Pod]) -> None:
        for name, service in by_name(self._objects, "Service").items():
            selector, target = {"matchLabels": service["spec"]["selector"]}, service["spec"]["ports"][0]["targetPort"]
            behind = [pod for pod in pods if selects(selector, pod.template["metadata"]["labels"])]
            self._network.publish(name, [(pod.address, pod.port(target)) for pod in behind])

    def _environment(self, name: str, address: str, template: Object, folders: Mapping[str, Path]) -> dict[str, str]:
        fields = {"metadata.name": name, "status.podIP": address}
        return {
            variable["name"]: _rewritten(variable["value"], folders)
            if "value" in variable
            else fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            for variable in container(template).get("env", [])
        }

    def _command(self, template: Object, folders: Mapping[str, Path], environment: Mapping[str, str]) -> list[str]:
        main = container(template)
        for folder in folders.values():
            for file in folder.glob("*.toml"):
                file.write_text(_rewritten(file.read_text(), folders))
        programs = {"python": sys.executable, "valkey-server": str(find_server())}
        words = [programs.get(word, word) for word in main["command"]]
        words += [_rewritten(word, folders) for word in main["args"]]
        for variable, value in environment.items():
            words = [word.replace(f"$({variable})", value) for word in words]
        return words

    def _mounts(self, pod: str, template: Object) -> dict[str, Path]:
        """The folder that stands for each volume, by its mount path. What is only this machine's is left alone."""
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        folders = {}
        for mount in container(template)["volumeMounts"]:
            volume = volumes.get(mount["name"], {})
            if "configMap" in volume:
                folder = self._folder / "config" / pod
                folder.mkdir(parents=True)
                for file, text in by_name(self._objects, "ConfigMap")[volume["configMap"]["name"]]["data"].items():
                    (folder / file).write_text(text)
                folders[mount["mountPath"]] = folder
            elif "secret" in volume:
                folders[mount["mountPath"]] = folder = self._volumes[volume["secret"]["secretName"]]
                lacking = [item["key"] for item in volume["secret"]["items"] if not (folder / item["path"]).is_file()]
                assert not lacking, f"{pod}: Secret {volume['secret']['secretName']} lacks {lacking}"
            elif "emptyDir" not in volume:
                folders[mount["mountPath"]] = self._volumes[mount["name"]]
        return folders


def _rewritten(text: str, folders: Mapping[str, Path]) -> str:
    """The text with paths into volumes as paths into their folders."""
    mounts = "|".join(re.escape(mount) for mount in sorted(folders, key=len, reverse=True))
    return re.sub(rf"(?<![\w/])({mounts})(?=[/\"]|$)", lambda found: str(folders[found[1]]), text)
