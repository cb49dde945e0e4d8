"""The `lightloom` command as people type it: real commands against a real cluster, their output and exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

from services.config import environment_with_malloc
from services.request import MAX_INPUT_BYTES
from tests.cluster.running import cluster_file, wait_for

ROOT = Path(__file__).resolve().parents[2]
MODEL = "demo/checkpoints/qwen_image"


def lightloom(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, on a wide terminal."""
    return subprocess.run(
        [sys.executable, "-m", "lightloom", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**environment_with_malloc(), "COLUMNS": "200", **environment},
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """A command that failed said so in one line."""
    assert done.returncode == code, done
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.fixture
def cluster(running_cluster):
    """Options that name the session's cluster."""
    return "--run-dir", running_cluster.run_dir


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A cluster file on free ports."""
    return cluster_file(tmp_path, MODEL)


# ---- Looking at a cluster --------------------------------------------------------------------------------------------


def test_generate_status_trace_and_abort(cluster, client, tmp_path):
    output = tmp_path / "out.webp"
    made = lightloom(
        "generate", "a red circle on a white background", "-o", output, "--steps", 2, "--seed", 5, *cluster
    )
    assert made.returncode == 0, made.stderr
    assert Image.open(output).format == "WEBP"
    assert "256x256, seed 5" in made.stderr and "dit" in made.stderr
    [newest] = client.list(1)

    status = lightloom("status", *cluster)
    assert status.returncode == 0, status.stderr
    [row] = [line for line in status.stdout.splitlines() if newest.request_id in line]
    assert row.split()[1:3] == ["done", "2/2"] and "a red circle" in row
    assert "dit 2" in status.stdout and "yes" in status.stdout
    rows = [line.split() for line in status.stdout.splitlines()]
    assert [row[1] for row in rows if row[0] in ("gateway-0", "gateway-1", "redis")] == ["serving"] * 3
    assert not status.stderr
    facts = json.loads(lightloom("status", "--json", "--limit", 1, *cluster).stdout)
    assert [request["id"] for request in facts["requests"]] == [newest.request_id]
    assert facts["ready"] and [model["id"] for model in facts["models"]] == ["demo"]
    assert {row["name"]: row["state"] for row in facts["processes"]}["gateway-1"] == "serving"

    trace = lightloom("trace", newest.request_id[:8], *cluster)
    assert trace.returncode == 0, trace.stderr
    for span in ("text.encode", "dit.denoise", "vae.decode", "gateway.store"):
        assert span in trace.stdout

    ended = lightloom("abort", newest.request_id, *cluster)
    assert (ended.returncode, ended.stdout) == (0, "done\n")
    running = client.submit("a cat", steps=200)
    stopped = lightloom("abort", running, *cluster)
    assert (stopped.returncode, stopped.stdout.strip()) in ((0, "cancelling"), (0, "cancelled"))
    wait_for(lambda: client.abort(running) == "cancelled")


def test_ctrl_c_aborts_what_is_being_made(running_cluster, client, tmp_path):
    address = running_cluster.cluster.grpc_address
    command = [sys.executable, "-m", "lightloom", "generate", "a lost cat", "--steps", "200"]
    # Steps that take a while: it must not be done before it is stopped.
    command += ["--size", "256x256", "--address", address]
    environment = {**environment_with_malloc(), "PYTHONPATH": str(ROOT)}
    making = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: [status for status in client.list(3) if status.params.prompt == "a lost cat" and status.step])
    making.send_signal(signal.SIGINT)
    _, said = making.communicate(timeout=30)
    assert making.returncode == 130
    [ours] = [status for status in client.list(3) if status.params.prompt == "a lost cat"]
    wait_for(lambda: client.abort(ours.request_id) == "cancelled")
    assert client.get(ours.request_id).step < 200
    assert said.strip() == f"aborted request {ours.request_id}"
    assert not list(tmp_path.iterdir())


def test_an_address_serves_instead_of_a_folder(running_cluster):
    there = lightloom("status", "--address", running_cluster.cluster.grpc_address, "--run-dir", "nowhere")
    assert there.returncode == 0 and "demo" in there.stdout
    refused(lightloom("status", "--address", "127.0.0.1:1", "--run-dir", "nowhere"), 1, "no service answers")
    refused(lightloom("status", "--address", running_cluster.cluster.http_address), 1, "give the gateway's gRPC port")
    refused(lightloom("status", "--run-dir", "nowhere"), 2, "no cluster runs in nowhere", "lightloom up", "--address")


def test_unknown_requests_and_bad_wishes(here, cluster, tmp_path):
    refused(here("trace", "none", *cluster), 1, "request id 'none' is too short: give 6 characters")
    refused(here("trace", "unknown", *cluster), 1, "requests has an id that begins with 'unknown'")
    refused(here("trace", "f" * 32, *cluster), 1, f"there is no request '{'f' * 32}'")
    refused(here("abort", "none", *cluster), 1, "there is no request 'none'")
    refused(here("generate", "a cat", "-o", tmp_path / "a.tiff", *cluster), 2, ".tiff", ".png")
    refused(here("generate", "a cat", "--size", "256*256", *cluster), 2, "WIDTHxHEIGHT")
    refused(here("generate", "a cat", "--model", "none", *cluster), 1, "there are demo")
    refused(here("generate", "a cat", "--image", tmp_path / "none.png", *cluster), 2, "none.png")
    for option in ("--last-image", "--control-video", "--mask"):
        refused(here("generate", "a cat", option, tmp_path, *cluster), 2, str(tmp_path), "cannot be read")
        words = "no MP4" if option == "--control-video" else "cannot be decoded"
        refused(here("generate", "a cat", option, "README.md", *cluster), 1, words)
    grid = "docs/demo_grid.png"
    refused(here("generate", "a cat", "--last-image", grid, *cluster), 1, "'last_image'", "takes image, mask")
    for option, word in (("--image", "picture"), ("--mask", "mask")):
        refused(here("generate", "a cat", option, grid, *cluster), 1, "or neither", f"only the {word}")
    large = tmp_path.parent / "large.mp4"
    large.write_bytes(b"\0" * (MAX_INPUT_BYTES + 1))
    refused(here("generate", "a cat", "--control-video", large, *cluster), 1, f"at most {MAX_INPUT_BYTES}")
    refused(here("generate", "a cat", "-o", tmp_path / "none" / "a.png", *cluster), 2, "no folder")
    refused(here("generate", "a cat", "-o", tmp_path, *cluster), 2, "is a folder")
    refused(here("generate", "a cat", "--seed", -1, *cluster), 1, "seed is -1", f"between 0 and {2**63 - 1}")
    refused(here("generate", "a cat", "--steps", 1, *cluster), 1, "between 2 and 200")
    assert not list(tmp_path.iterdir())


def test_scale(cluster, running_cluster):
    more = lightloom("scale", "text_encoder=2", *cluster)
    assert more.returncode == 0, more.stderr
    names = [line.split()[0] for line in more.stdout.splitlines() if line.startswith("text_encoder-")]
    assert len(names) == 2
    assert f"starting: {names[1]};" in more.stdout
    fewer = lightloom("scale", "text_encoder=1", *cluster)
    assert fewer.returncode == 0, fewer.stderr
    assert len(running_cluster.names("text_encoder")) == 1
    refused(lightloom("scale", "dot=1", *cluster), 2, "unknown stage 'dot'")
    refused(lightloom("scale", "dit=many", *cluster), 2, "STAGE=COUNT")
    refused(lightloom("scale", "dit=1", "--model", "none", *cluster), 2, "unknown model 'none'", "demo")
    refused(lightloom("scale", "dit=1", "--run-dir", "nowhere"), 2, "no cluster runs")


# ---- Looking at the machine ------------------------------------------------------------------------------------------


def test_version():
    shown = lightloom("--version")
    assert shown.returncode == 0 and shown.stdout.startswith("lightloom ")


def test_features_prints_the_matrix(here):
    shown = here("features")
    assert shown.returncode == 0, shown.stderr
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert ["qwen_image", "attention", "yes", "works"] in rows
    assert ["qwen_image", "compile", "no", "works"] in rows


def test_doctor_tells_good_from_bad(config, tmp_path):
    fine = lightloom("doctor", "--config", config, "--run-dir", tmp_path)
    assert fine.returncode == 0, fine.stdout
    assert "bad" not in fine.stdout
    for subject in ("python", "packages", "device", "config", "ports", "redis", "disk"):
        assert subject in fine.stdout
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        busy = lightloom("doctor", "--config", cluster_file(tmp_path, "nowhere", port), "--run-dir", tmp_path)
    assert busy.returncode == 1
    assert "model folder nowhere does not exist" in busy.stdout and f"{port} cannot be bound" in busy.stdout
    deaf = lightloom("doctor", "--config", config, REDIS_URL="redis://127.0.0.1:1/0")
    assert deaf.returncode == 1 and "REDIS_URL does not answer" in deaf.stdout


# ---- A cluster in the foreground -------------------------------------------------------------------------------------


class Up:
    """`lightloom up` in the foreground."""

    def __init__(self, config: Path, run_dir: Path, **environment: str) -> None:
        self.run_dir = run_dir
        self._output = config.with_suffix(".out")
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lightloom", "up", "--config", str(config), "--run-dir", str(run_dir)],
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env={**environment_with_malloc(), "COLUMNS": "200", **environment},
            )

    def said(self) -> str:
        """What it has printed."""
        return self._output.read_text()

    def family(self) -> list[psutil.Process]:
        """Every process below it."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def interrupt(self) -> list[psutil.Process]:
        """Ctrl-C; returns the processes that are left when it has ended."""
        family = self.family()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)
        _, alive = psutil.wait_procs(family, 1)
        return alive


def test_up_serves_and_ctrl_c_leaves_no_process(config, tmp_path):
    up = Up(config, tmp_path / "run")
    # The table of processes comes at once, and commands know that the cluster is not there yet.
    wait_for(lambda: "gateway-0" in up.said(), 30)
    early = lightloom("generate", "a cat", "-o", tmp_path / "early.png", "--run-dir", up.run_dir)
    refused(early, 1, "is still starting", "dit-demo-2")
    assert "still starting" in lightloom("status", "--run-dir", up.run_dir).stdout
    wait_for(lambda: "ready after" in up.said(), 90)
    assert all(f"{name} serves" in up.said() for name in ("text_encoder-demo-1", "dit-demo-2", "vae-demo-3"))
    assert "yes" in lightloom("status", "--run-dir", up.run_dir).stdout
    refused(lightloom("up", "--config", config, "--run-dir", up.run_dir), 2, "a cluster already runs in", "--run-dir")
    # Redis, a gateway, three fronts, three ranks.
    assert len(up.family()) == 8
    [server] = [process for process in up.family() if process.name() in ("redis-server", "valkey-server")]
    server.kill()
    # It comes back, and the cluster with it.
    made = lightloom("generate", "a cat", "-o", tmp_path / "cat.png", "--steps", 2, "--run-dir", up.run_dir)
    if made.returncode:
        refused(made, 1, "state store")
        wait_for(lambda: len(up.family()) == 8)
        made = lightloom("generate", "a cat", "-o", tmp_path / "cat.png", "--steps", 2, "--run-dir", up.run_dir)
    assert made.returncode == 0, made.stderr
    [rank] = [process for process in up.family() if "dit_svc.rank" in process.cmdline()]
    ranks = {row["name"]: (row["ranks"], row["rank_pids"]) for row in status_of(up.run_dir)["processes"]}
    assert ranks["dit-demo-2"] == (1, [rank.pid]) and ranks["gateway-0"] == ranks["redis"] == (0, [])
    rank.kill()
    wait_for(lambda: "dit-demo-2 lost a rank" in up.said())
    assert "redis died" in up.said() and "redis was started again (restarts: 1)" in up.said()
    restarts = {row["name"]: (row["restarts"], row["rank_restarts"]) for row in status_of(up.run_dir)["processes"]}
    assert restarts["redis"] == (1, 0) and restarts["dit-demo-2"] == (0, 1)
    assert not up.interrupt()
    assert up.process.returncode == 0
    assert "Ctrl-C stops everything" in up.said() and "Traceback" not in up.said()
    assert not (up.run_dir / "control.sock").exists()


def status_of(run_dir: Path) -> dict:
    return json.loads(lightloom("status", "--json", "--run-dir", run_dir).stdout)


def test_a_killed_cluster_is_told_from_none(config, tmp_path):
    up = Up(config, tmp_path / "run")
    wait_for(lambda: "gateway-0" in up.said(), 30)
    family = up.family()
    up.process.kill()
    up.process.wait()
    refused(lightloom("status", "--run-dir", up.run_dir), 2, "was killed", "lightloom up")
    _, alive = psutil.wait_procs(family, 20)
    assert not alive


def test_ctrl_c_while_it_starts_leaves_no_process(config, tmp_path):
    up = Up(config, tmp_path / "run")
    wait_for(lambda: len(up.family()) >= 5, 30)
    assert not up.interrupt()
    assert up.process.returncode == 0
    assert "Traceback" not in up.said()


def test_what_up_cannot_start(tmp_path):
    """One line says why, and nothing is left."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        bogus, limit = "[models.demo.features.bogus]", "max_step = 9"
        heads = "[models.demo.parallel]\ntensor_parallel_size = 3"
        keys = '[gateway.access]\nkeys_file = "none.jsonl"'
        cases = [
            (cluster_file(folder(tmp_path, "port"), MODEL, port), {}, f"HTTP port 127.0.0.1:{port} cannot be bound"),
            (cluster_file(folder(tmp_path, "model"), "nowhere"), {}, "model folder nowhere does not exist"),
            (cluster_file(folder(tmp_path, "empty"), str(tmp_path)), {}, "has no model_index.json"),
            (cluster_file(folder(tmp_path, "random"), "random:0"), {}, "needs a family and a preset"),
            (cluster_file(folder(tmp_path, "feature"), MODEL, more=bogus), {}, "unknown feature 'bogus'"),
            (
                cluster_file(folder(tmp_path, "limit"), MODEL, more=limit),
                {},
                "unknown config key models.demo.limits.max",
            ),
            (
                cluster_file(folder(tmp_path, "heads"), MODEL, more=heads),
                # Without GPUs, wherever this runs.
                {"CUDA_VISIBLE_DEVICES": ""},
                "model 'demo', dit: parallel.tensor_parallel_size 3 does not divide the 4 attention heads: use 1, 2, 4",
            ),
            (cluster_file(folder(tmp_path, "keys"), MODEL, more=keys), {}, f"{ROOT / 'none.jsonl'} does not exist"),
            (broken_file(folder(tmp_path, "key")), {}, "unknown config key modles"),
            (tmp_path / "none.toml", {}, "none.toml does not exist"),
            (cluster_file(folder(tmp_path, "redis"), MODEL), {"REDIS_URL": "redis://127.0.0.1:1/0"}, "does not answer"),
        ]
        for config, environment, words in cases:
            refused(lightloom("up", "--config", config, "--run-dir", tmp_path / "run", **environment), 2, words)
            # Nothing was started for it.
            assert not list((tmp_path / "run").rglob("*.jsonl")), words
            assert not left_behind(tmp_path / "run"), words


def folder(root: Path, name: str) -> Path:
    (root / name).mkdir()
    return root / name


def broken_file(root: Path) -> Path:
    path = root / "cluster.toml"
    path.write_text(f'[modles.demo]\nsource = "{MODEL}"\n')
    return path


def left_behind(run_dir: Path) -> list[list[str]]:
    """Processes whose command line names the run folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any(str(run_dir) in part for part in command) and process.pid != os.getpid():
            found.append(command)
    return found
