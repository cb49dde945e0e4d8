"""TLS at the gateway's fronts, and both ways between gateway and stages, with real processes and certificates."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import httpx
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lightloom import Client
from lightloom.cluster_config import write_toml
from services.config import TlsSection, environment_with_malloc
from services.errors import NotReady
from services.free_port import free_port
from tests.cluster.certificates import issue, new_authority
from tests.cluster.gateway_process import ROOT, GatewayProcess, gateway
from tests.cluster.redis_process import own_redis
from tests.cluster.running import RunningCluster, wait_for

CLOSED = "does it speak TLS, ask for a client certificate, or refuse ours?"
STAGES = ("text_encoder", "dit", "vae")
OPTIONS = {"width": 128, "height": 128, "steps": 2}


@dataclass
class Secured:
    """Stages that ask for certificates, a gateway that has one, and the files of each side."""

    authority: trustme.CA
    files: dict[str, str]
    stage_files: dict[str, str]
    stages: dict[str, str]
    health_ports: list[int]
    gateway: GatewayProcess
    redis_url: str

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.gateway.grpc_port}"

    @property
    def client_tls(self) -> TlsSection:
        return TlsSection(ca=self.files["ca"])


def serving(health_port: int) -> bool:
    """Whether a stage serves, asked as a probe without a certificate does."""
    with grpc.insecure_channel(f"127.0.0.1:{health_port}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.RpcError:
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


@contextlib.contextmanager
def stage_processes(folder: Path, cluster: RunningCluster, tls: dict[str, str]) -> Iterator[tuple[dict, list[int]]]:
    """A process of each stage beside the cluster's own, with its settings and TLS, once they serve."""
    addresses, health_ports, processes = {}, [], []
    try:
        for stage in STAGES:
            table = cluster.settings(cluster.names(stage)[0])
            ports = {"port": free_port(), "metrics_port": free_port(), "health_port": free_port()}
            table["service"] |= {**ports, "name": f"{stage}-tls"}
            write_toml(folder / f"{stage}.toml", {**table, "tls": tls})
            with (folder / f"{stage}.log").open("w") as log:
                command = [sys.executable, "-m", f"{stage}_svc", "--config", str(folder / f"{stage}.toml")]
                started = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment_with_malloc())
            processes.append(started)
            addresses[stage] = f"127.0.0.1:{ports['port']}"
            health_ports.append(ports["health_port"])
        wait_for(lambda: all(serving(port) for port in health_ports), 180)
        yield addresses, health_ports
    finally:
        for process in processes:
            process.terminate()
        assert [process.wait(60) for process in processes] == [0, 0, 0]


@pytest.fixture(scope="module")
def secured(running_cluster, tmp_path_factory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")
    authority, files = new_authority(folder / "gateway")
    stage_files = {"ca": files["ca"], **issue(authority, folder / "stages")}
    verify = ssl.create_default_context(cafile=files["ca"])
    front = {"cert": files["cert"], "key": files["key"]}
    sections = {"tls": front, "stage_tls": files}
    with (
        stage_processes(folder, running_cluster, stage_files) as (stages, health_ports),
        own_redis(folder) as redis_url,
        gateway(folder / "g", redis_url, stages, settings=sections, verify=verify) as running,
    ):
        yield Secured(authority, files, stage_files, stages, health_ports, running, redis_url)


def test_a_request_over_tls_all_the_way(secured, tmp_path) -> None:
    with Client(secured.grpc_address, tls=secured.client_tls) as client:
        assert client.generate("a red circle", **OPTIONS).data.startswith(b"\x89PNG")
        assert {replica.address for replica in client.models()[0].replicas} == set(secured.stages.values())
    made = secured.gateway.rest.post(
        "/v1/images/generations", json={"prompt": "a red circle", "size": "128x128", "steps": 2}
    )
    assert made.status_code == 200
    command = [sys.executable, "-m", "lightloom", "generate", "a red circle", "-o", str(tmp_path / "o.png")]
    command += ["--size", "128x128", "--steps", "2", "--address", secured.grpc_address, "--ca", secured.files["ca"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_who_does_not_trust_the_gateway_says_why(secured, tmp_path) -> None:
    _, other = new_authority(tmp_path)
    trusting_another = TlsSection(ca=other["ca"])
    misnamed = TlsSection(ca=secured.files["ca"], server_name="elsewhere")
    for tls in (trusting_another, misnamed):
        with (
            Client(secured.grpc_address, tls=tls) as client,
            pytest.raises(NotReady, match="TLS handshake failed: the service's certificate is not accepted"),
        ):
            client.models()
    with Client(secured.grpc_address) as client, pytest.raises(NotReady, match=re.escape(CLOSED)):
        client.models()
    with (
        Client(f"127.0.0.1:{secured.health_ports[0]}", tls=secured.client_tls) as client,
        pytest.raises(NotReady, match="the service speaks plain text"),
    ):
        client.models()
    with pytest.raises(httpx.ConnectError, match="(?i)certificate.verify"):
        httpx.get(f"https://127.0.0.1:{secured.gateway.http_port}/health")


def refused(secured: Secured, folder: Path, **stage_tls: str) -> str:
    """The log of a gateway with other certificates for its stages, once it has tried."""
    sections = {"stage_tls": stage_tls}
    with gateway(folder, secured.redis_url, secured.stages, ready=503, settings=sections) as running:
        wait_for(lambda: running.log.read_text().count("replica 127.0.0.1") >= 3, 30)
        assert running.health() == 503
        return running.log.read_text()


def test_stages_take_only_gateways_with_a_certificate_of_theirs(secured, tmp_path) -> None:
    _, other = new_authority(tmp_path / "other")
    ca = secured.files["ca"]
    for name, stage_tls in (("missing", {}), ("foreign", {"cert": other["cert"], "key": other["key"]})):
        log = refused(secured, tmp_path / name, ca=ca, **stage_tls)
        assert CLOSED in log, name
    assert "TLS handshake failed" in refused(secured, tmp_path / "untrusting", ca=other["ca"])
    assert CLOSED in refused(secured, tmp_path / "plain")


def test_a_certificate_that_has_expired_starts_nothing(secured, tmp_path) -> None:
    expired = issue(secured.authority, tmp_path / "old", not_after=datetime.now(UTC) - timedelta(days=1))
    for section, tls in (("tls", expired), ("stage_tls", {**expired, "ca": secured.files["ca"]})):
        (tmp_path / section).mkdir()
        running = GatewayProcess(tmp_path / section, secured.redis_url, secured.stages, settings={section: tls})
        assert running.ended() == 2
        last = running.log.read_text().splitlines()[-1]
        assert last.startswith(f"tls: the certificate in {expired['cert']} expired at 20"), last


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": ""}, "tls: cert and key go together"),
        ({"cert": "none"}, "tls: none cannot be read: No such file"),
        ({"cert": "junk"}, "tls: junk holds no certificate in PEM"),
        ({"key": "other"}, "tls: the key in other is not that of the certificate"),
        ({"ca": "system"}, "tls: a server needs cert and key; its ca is the file"),
    ],
)
def test_certificates_that_cannot_be_used_are_named(secured, tmp_path, monkeypatch, change, message) -> None:
    monkeypatch.chdir(tmp_path)
    Path("junk").write_text("junk")
    Path("other").write_bytes(Path(new_authority(tmp_path / "o")[1]["key"]).read_bytes())
    named = {
        name: str(tmp_path / value) if value in ("none", "junk", "other") else value for name, value in change.items()
    }
    tls = {"cert": secured.files["cert"], "key": secured.files["key"], **named}
    running = GatewayProcess(tmp_path, secured.redis_url, secured.stages, settings={"tls": tls})
    assert running.ended() == 2
    assert message in running.log.read_text().splitlines()[-1].replace(f"{tmp_path}/", "")


def shown(port: int, secured: Secured) -> bytes:
    """The certificate that a server shows to a new connection."""
    context = ssl.create_default_context(cafile=secured.files["ca"])
    context.load_cert_chain(secured.files["cert"], secured.files["key"])
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as connection,
    ):
        certificate = connection.getpeercert(binary_form=True)
        assert certificate
        return certificate


def test_a_new_certificate_is_shown_from_the_next_connection_on(secured) -> None:
    stage_port = int(secured.stages["dit"].rpartition(":")[2])
    ports = [secured.gateway.grpc_port, secured.gateway.http_port, stage_port]
    with Client(secured.grpc_address, tls=secured.client_tls) as standing:
        standing.models()
        before = [shown(port, secured) for port in ports]
        for files in (secured.files, secured.stage_files):
            issue(secured.authority, Path(files["cert"]).parent)
        after = [shown(port, secured) for port in ports]
        for old, new in zip(before, after, strict=True):
            assert old != new
        # Half a rotation, or a slip: what was good stays.
        for files in (secured.files, secured.stage_files):
            good = Path(files["cert"]).read_bytes()
            Path(files["cert"]).write_text("half a certif")
            for port in ports:
                with contextlib.suppress(ssl.SSLError, OSError):
                    socket.create_connection(("127.0.0.1", port), timeout=20).close()
            Path(files["cert"]).write_bytes(good)
        assert [shown(port, secured) for port in ports] == after
        assert standing.generate("a red circle", **OPTIONS).data
    assert "read the certificate in" in secured.gateway.log.read_text()


def test_a_new_certificate_amid_many_new_connections_ends_no_process(secured) -> None:
    """Without a pause before gRPC frees the one before, the gateway dies within two seconds of this."""
    chain = Path(secured.files["cert"])
    written = chain.with_name("written.pem")
    before = rotations(secured)
    plain, over = chain.read_bytes(), threading.Event()
    with ThreadPoolExecutor(8) as pool:
        connecting = [pool.submit(connect_until, over, secured.gateway.grpc_port) for _ in range(8)]
        try:
            for number in range(2000):
                # Other bytes are another certificate.
                written.write_bytes(plain + b"\n" * (number % 2))
                written.replace(chain)
                time.sleep(0.002)
        finally:
            over.set()
    assert sum(each.result() for each in connecting) > 8
    assert secured.gateway.process.poll() is None
    assert rotations(secured) > before + 4
    with Client(secured.grpc_address, tls=secured.client_tls) as client:
        # It shows its certificate to stages, too, and so has connected to them anew.
        wait_for(client.models)


def rotations(secured: Secured) -> int:
    return secured.gateway.log.read_text().count("read the certificate in")


def connect_until(over: threading.Event, port: int) -> int:
    """Connects to a port again and again; returns how often. Each connection begins a handshake."""
    times = 0
    while not over.is_set():
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            times += 1
    return times
