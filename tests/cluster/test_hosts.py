"""A denoiser over two hosts: this one, and a network namespace with an address, a link and an agent of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack

import psutil
import pytest
import torch

from protos import dit_pb2, types_pb2
from services.tensor_wire import frame_of
from services.tensors import BundleReader, bundle_frames
from services.wire import params_to_proto
from tests.cluster.stage_process import ROOT, StageProcess
from tests.cluster.stage_process import stage as running_stage
from tests.deploy.networks import ip
from tests.oracle import ROWS
from tests.oracle.harness import Subject, difference, make_folder

# By process: other runs on this machine, also killed ones, have names and addresses of their own.
HERE, THERE = (f"10.77.{os.getpid() % 256}.{host}" for host in (1, 2))
SPACE, LINK, THEIR_LINK = f"lightloom-{os.getpid()}", f"ll{os.getpid()}a", f"ll{os.getpid()}b"
AGENT_PORT = 50199
TOKEN = "a secret of the test"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="making network namespaces needs root and iproute2"
)


@pytest.fixture
def other_host(tmp_path):
    """A second host with an agent; gone with everything in it afterwards."""
    with ExitStack() as stack:
        ip("netns", "add", SPACE)
        stack.callback(ip, "netns", "del", SPACE)
        ip("link", "add", LINK, "type", "veth", "peer", "name", THEIR_LINK, "netns", SPACE)
        # A namespace takes its links along in its own time, and the next test makes one of the same name.
        stack.callback(ip, "link", "del", LINK)
        ip("addr", "add", f"{HERE}/24", "dev", LINK)
        ip("link", "set", LINK, "up")
        ip("-n", SPACE, "addr", "add", f"{THERE}/24", "dev", THEIR_LINK)
        ip("-n", SPACE, "link", "set", THEIR_LINK, "up")
        ip("-n", SPACE, "link", "set", "lo", "up")
        token = tmp_path / "token"
        token.write_text(TOKEN)
        command = [sys.executable, "-m", "dit_svc.agent", "--listen", f"{THERE}:{AGENT_PORT}"]
        log = stack.enter_context((tmp_path / "agent.log").open("wb"))
        agent = subprocess.Popen(
            ["ip", "netns", "exec", SPACE, *command, "--token-file", str(token)], cwd=ROOT, stdout=log, stderr=log
        )
        stack.callback(agent.wait, 10)
        stack.callback(agent.terminate)
        yield agent


@pytest.fixture
def tiny(tmp_path):
    row = next(row for row in ROWS if str(row) == "qwen_image-t2i")
    with torch.inference_mode():
        yield Subject(row, make_folder(row, tmp_path / "model")), row


def command_lines() -> str:
    """What every user of the machine can read of every process."""
    return "\n".join(" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))


def settings(folder, token) -> dict[str, object]:
    return {
        "model.source": str(folder),
        "model.device": "cpu",
        "parallel.ulysses_degree": 2,
        "parallel.hosts": [f"{THERE}:{AGENT_PORT}"],
        "parallel.leader_address": HERE,
        "parallel.agent_token_file": str(token),
    }


async def denoise(stage: StageProcess, params, conditions) -> dict[str, torch.Tensor]:
    """One call as a gateway makes it."""
    start = dit_pb2.DenoiseStart(
        context=types_pb2.RequestContext(request_id="r", fence=1),
        params=params_to_proto(params),
        num_bundles=1,
    )
    messages = [dit_pb2.DenoiseRequest(start=start).SerializeToString(), *bundle_frames(conditions)]
    reader = BundleReader()
    async for message in stage.channel.stream_stream("/lightloom.v1.Dit/Denoise")(iter(messages), timeout=60):
        frame = frame_of(message)
        if frame is not None and (bundle := reader.feed(frame)) is not None:
            return bundle.tensors
    raise AssertionError("no latents came")


async def test_a_group_over_two_hosts_serves_and_a_dead_host_takes_it_down(tmp_path, other_host, tiny):
    subject, row = tiny
    params = subject.params(row.wishes[0])
    conditions = subject.job("r", params).conditions
    expected = subject.stock(params)
    options = {"module": "dit_svc", "settings": settings(tmp_path / "model", tmp_path / "token"), "start_timeout_s": 90}
    async with running_stage(tmp_path, **options) as stage:
        assert TOKEN not in stage.log.read_text() + (tmp_path / "agent.log").read_text() + command_lines()
        assert difference(await denoise(stage, params, conditions), expected) <= 1e-4
        ip("link", "set", LINK, "down")
        await stage.until("NOT_SERVING", 25)
        ip("link", "set", LINK, "up")
        await stage.until("SERVING", 90)
        assert difference(await denoise(stage, params, conditions), expected) <= 1e-4


async def test_an_agent_lends_nothing_to_those_who_do_not_know_its_secret(tmp_path, other_host, tiny):
    guess = tmp_path / "guess"
    guess.write_text("a guess")
    stage = StageProcess(tmp_path, module="dit_svc", settings=settings(tmp_path / "model", guess))
    await stage.start()
    try:
        assert await stage.exit_code(60) == 2
        assert f"the connection to {THERE}:{AGENT_PORT} ended" in stage.last_line()
    finally:
        await stage.stop()
    assert "wrong token" in (tmp_path / "agent.log").read_text()
