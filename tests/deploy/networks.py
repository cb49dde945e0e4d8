"""Where pods that run as processes have their addresses.

`Namespaces` gives every pod one of its own, so that ports and `dns:///` names stay as rendered; it needs root.
`Loopback` gives it ports of its own instead, by `--set`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from services.free_port import free_port
from tests.deploy.chart import STAGES, Object, container

# By process: other runs on this machine, also killed ones, have names and addresses of their own.
BRIDGE, SUBNET = f"ll{os.getpid()}pods", f"10.78.{os.getpid() % 256}"
# Where pods of LeaderWorkerSets find each other.
AGENT_PORT = 50100


class Network(Protocol):
    """What the pods of a test are connected by; `host` is the test's own address there."""

    host: str

    def join(self, name: str, template: Object) -> tuple[str, dict[int, int]]:
        """A pod's address, and which of its ports is which there."""

    def words(self, name: str, words: list[str]) -> list[str]:
        """The command line that runs the pod's process on this network."""

    def publish(self, name: str, addresses: list[tuple[str, int]]) -> None:
        """Makes a name lead to these addresses and ports."""

    def close(self) -> None:
        """Leaves nothing behind."""


class Namespaces:
    """A network namespace a pod, all on one bridge. /etc/hosts is the cluster's DNS."""

    host = f"{SUBNET}.1"

    def __init__(self) -> None:
        self._pods: list[str] = []
        self._names: dict[str, list[str]] = {}
        self._made = ExitStack()
        ip("link", "add", "name", BRIDGE, "type", "bridge")
        self._made.callback(ip, "link", "del", BRIDGE)
        ip("addr", "add", f"{self.host}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")

    def join(self, name: str, template: Object) -> tuple[str, dict[int, int]]:
        number = len(self._pods) + 2
        space, link, address = _space(name), f"ll{os.getpid()}p{number}", f"{SUBNET}.{number}"
        ip("netns", "add", space)
        self._made.callback(ip, "netns", "del", space)
        self._pods.append(space)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        # A namespace takes its links along in its own time, and the next network makes some of the same names.
        self._made.callback(ip, "link", "del", link)
        ip("link", "set", link, "master", BRIDGE, "up")
        ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        ip("-n", space, "link", "set", "lo", "up")
        # `ip netns exec` mounts this file over /etc/hosts.
        _hosts(space).parent.mkdir(parents=True)
        self._made.callback(shutil.rmtree, _hosts(space).parent)
        self._write(space)
        return address, {port["containerPort"]: port["containerPort"] for port in container(template)["ports"]}

    def words(self, name: str, words: list[str]) -> list[str]:
        return ["ip", "netns", "exec", _space(name), *words]

    def publish(self, name: str, addresses: list[tuple[str, int]]) -> None:
        self._names[name] = [address for address, _ in addresses]
        for space in self._pods:
            self._write(space)

    def _write(self, space: str) -> None:
        # In place: who has it mounted keeps the file, not its name.
        lines = [f"{address} {name}" for name, found in self._names.items() for address in found]
        _hosts(space).write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")

    def close(self) -> None:
        self._made.close()


class Loopback:
    """All pods on 127.0.0.1, each with ports of its own; a file a name is the cluster's DNS."""

    host = "127.0.0.1"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports: dict[str, dict[int, int]] = {}
        folder.mkdir()

    def join(self, name: str, template: Object) -> tuple[str, dict[int, int]]:
        self._ports[name] = {port["containerPort"]: free_port() for port in container(template)["ports"]}
        return self.host, self._ports[name]

    def words(self, name: str, words: list[str]) -> list[str]:
        ports = self._ports[name]
        if 8081 in ports:
            settings = {
                "gateway.host": "127.0.0.1",
                "gateway.http_port": ports[8080],
                "gateway.grpc_port": ports[8081],
            }
            if 50052 in ports:
                settings["gateway.health_port"] = ports[50052]
            for stage in (module.removesuffix("_svc") for module in STAGES):
                settings[f"stages.{stage}"] = f"file:{self._folder / 'pix-lightloom'}-{stage.replace('_', '-')}"
        elif 50051 in ports:
            settings = {"service.host": "127.0.0.1", "service.port": ports[50051], "service.metrics_port": ports[9090]}
            if 50052 in ports:
                settings["service.health_port"] = ports[50052]
            if any("parallel.hosts=" in word for word in words):
                agents = [entry[AGENT_PORT] for entry in self._ports.values() if AGENT_PORT in entry]
                settings["parallel.hosts"] = json.dumps([f"127.0.0.1:{port}" for port in agents])
        else:
            for port, own in ports.items():
                words = [word.replace(str(port), str(own)).replace("0.0.0.0", "127.0.0.1") for word in words]
            settings = {}
        return [*words, *(f"--set={key}={value}" for key, value in settings.items())]

    def publish(self, name: str, addresses: list[tuple[str, int]]) -> None:
        fresh = self._folder / f"{name}.new"
        fresh.write_text("".join(f"{address}:{port}\n" for address, port in addresses))
        fresh.replace(self._folder / name)

    def close(self) -> None:
        """Nothing is left."""


def choose(folder: Path) -> Network:
    """Namespaces for those who may make them."""
    if os.geteuid() == 0 and shutil.which("ip") is not None:
        return Namespaces()
    return Loopback(folder)


def _space(name: str) -> str:
    return f"lightloom-{os.getpid()}-{name}"


def _hosts(space: str) -> Path:
    return Path("/etc/netns") / space / "hosts"


def ip(*words: str) -> None:
    """Runs `ip`; an error says what it said."""
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    assert not done.returncode, f"ip {' '.join(words)}: {done.stderr}"
