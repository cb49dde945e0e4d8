"""A real front and a real rank process, through gRPC: what callers see, whatever happens inside."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest
import pytest_asyncio
import torch
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import dit_pb2, dit_pb2_grpc, types_pb2
from services import rank_group
from services.channel import OpenCall
from services.client import connect, error_from_rpc
from services.config import ModelSection, ServiceSection, StageConfig
from services.errors import (
    Cancelled,
    CorruptTensor,
    DeadlineExceeded,
    DeviceLost,
    Internal,
    InvalidRequest,
    NotReady,
    Overloaded,
    StaleFence,
)
from services.rank_group import RankGroup
from services.telemetry import new_traceparent
from services.tensors import BundleReader, bundle_frames
from tests.cluster.stage_process import StageProcess, failure, run_call, stage, start_message

MIB = 1024 * 1024
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[StageProcess]:
    async with sound_stage(tmp_path_factory.mktemp("shared")) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def served(shared: StageProcess) -> AsyncIterator[StageProcess]:
    """The stage of all tests that leave it as they found it."""
    yield shared
    await shared.until_figure("lightloom_in_flight", 0)
    await shared.until_figure("lightloom_rank_jobs", 0)
    assert await shared.figure("lightloom_rank_restarts_total") == 0


@pytest_asyncio.fixture(loop_scope="module")
async def own(tmp_path: Path) -> AsyncIterator[StageProcess]:
    """A stage for one test, which may break it, or measures and counts."""
    async with sound_stage(tmp_path) as running:
        yield running


@asynccontextmanager
async def sound_stage(folder: Path) -> AsyncIterator[StageProcess]:
    """A stage with three slots, in whose log nothing surprising must stand."""
    async with stage(folder, max_in_flight=3) as running:
        yield running
    log = running.log.read_text()
    assert "Unexpected" not in log and "never retrieved" not in log, log


def frames(tensors: dict[str, torch.Tensor]) -> list[dit_pb2.DenoiseRequest]:
    return [dit_pb2.DenoiseRequest.FromString(message) for message in bundle_frames(tensors)]


def bundles_of(responses: list[dit_pb2.DenoiseResponse]) -> list[dict[str, torch.Tensor]]:
    reader, bundles = BundleReader(), []
    for response in responses:
        if response.WhichOneof("kind") == "frame" and (bundle := reader.feed(response.frame.SerializeToString())):
            bundles.append(bundle.tensors)
    return bundles


async def begin(served: StageProcess, prompt: str, **options: object) -> grpc.aio.StreamStreamCall:
    """A call that is in work: its first response has come."""
    call = served.stub.Denoise(timeout=30)
    await call.write(start_message(prompt, **options))
    first = await call.read()
    assert first is not grpc.aio.EOF
    return call


async def error_of(call: grpc.aio.StreamStreamCall) -> Exception:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.RpcError as error:
        return error_from_rpc(error)
    raise AssertionError("the call did not fail")


# ---- What a stage answers --------------------------------------------------------------------------


async def test_describe_health_and_reflection(served: StageProcess) -> None:
    about = await served.describe()
    assert (about.stage, about.component_id, about.protocol_version) == (types_pb2.STAGE_DIT, "fake", 1)
    assert (about.max_in_flight, about.in_flight, about.draining, about.world_size) == (3, 0, False, 1)
    assert about.replica_id and about.build
    call = await begin(served, "wait")
    busy = await served.describe()
    assert (busy.in_flight, busy.replica_id) == (1, about.replica_id)
    call.cancel()
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([question])):
        names = {service.name for service in answer.list_services_response.service}
    assert {"lightloom.v1.Dit", "grpc.health.v1.Health"} <= names


async def test_only_the_rank_loads_torch(served: StageProcess) -> None:
    def has_torch(pid: int) -> bool:
        return any("torch" in mapped.path for mapped in psutil.Process(pid).memory_maps())

    assert has_torch(await served.rank_pid()) and not has_torch(served.process.pid)


async def test_bundles_pass_unchanged(served: StageProcess) -> None:
    generator = torch.Generator().manual_seed(1)
    one = {
        "positive/x": torch.randn(1, 700_001, generator=generator),
        "half": torch.randn(3, 5, generator=generator).to(torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "nothing": torch.empty(0, 4),
    }
    two = {"scalar": torch.tensor(7)}
    start = start_message("echo", bundles=2)
    responses = await run_call(served.stub, start, *frames(one), *frames(two))
    assert responses[-1].usage.busy_s == 1.0
    first, second = bundles_of(responses)
    for name, tensor in one.items():
        assert first[name].dtype == tensor.dtype and torch.equal(first[name], tensor), name
    assert second["scalar"].item() == 7


async def test_errors_keep_their_class_and_bugs_stay_inside(served: StageProcess) -> None:
    refused = await failure(served.stub, start_message("refuse", request_id="r-refused"))
    assert isinstance(refused, InvalidRequest)
    assert (refused.param, refused.request_id) == ("steps", "r-refused")
    bug = await failure(served.stub, start_message("bug", request_id="r-bug"))
    assert type(bug) is Internal
    assert "secret" not in bug.message
    error_id = bug.message.split()[2].rstrip(":")
    lines = [json.loads(line) for line in served.log.read_text().splitlines()]
    logged = next(line for line in lines if line.get("error_id") == error_id)
    assert "a secret of the implementation" in logged["trace"]
    assert logged["request_id"] == "r-bug" and logged["process"] == "fake.rank0"
    # A bug in tick has no call of its own: all open calls fail, and the rank goes on.
    assert type(await failure(served.stub, start_message("tickbug"))) is Internal
    assert len(await run_call(served.stub, start_message("steps", steps=3))) == 4


async def test_first_messages_that_say_nothing_are_refused(served: StageProcess) -> None:
    nameless = dit_pb2.DenoiseRequest(start=dit_pb2.DenoiseStart())
    for messages in ((), (nameless,), (dit_pb2.DenoiseRequest(),), (start_message("echo", request_id="x" * 129),)):
        assert isinstance(await failure(served.stub, *messages), InvalidRequest)
    raw = served.channel.stream_stream("/lightloom.v1.Dit/Denoise")
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in raw(iter([b"\xff\xff\xff"])):
            pass
    assert isinstance(error_from_rpc(caught.value), InvalidRequest)
    with pytest.raises(grpc.RpcError) as caught:
        await served.channel.unary_unary("/lightloom.v1.Dit/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_messages_too_large_are_refused_and_the_stage_lives(served: StageProcess) -> None:
    for size in (9 * MIB, 17 * MIB):
        large = start_message("echo")
        large.start.params.inputs.add(mime="image/png", data=b"x" * size)
        error = await failure(served.stub, large)
        assert isinstance(error, InvalidRequest | Overloaded) and str(error), size
        chunk = dit_pb2.DenoiseRequest()
        chunk.frame.chunk.data = b"x" * size
        error = await failure(served.stub, start_message("wait"), chunk)
        assert isinstance(error, InvalidRequest | Overloaded), size
    assert len(await run_call(served.stub, start_message("steps"))) == 2
    await served.until_figure("lightloom_rank_jobs", 0)


async def test_a_flipped_bit_is_noticed(served: StageProcess) -> None:
    messages = frames({"x": torch.arange(1000)})
    damaged = bytearray(messages[1].frame.chunk.data)
    damaged[77] ^= 4
    messages[1].frame.chunk.data = bytes(damaged)
    error = await failure(served.stub, start_message("echo", bundles=1), *messages)
    assert isinstance(error, CorruptTensor) and "crc32c" in error.message


async def test_trace_context_reaches_the_rank(served: StageProcess) -> None:
    traceparent = new_traceparent()
    responses = await run_call(served.stub, start_message("trace"), metadata=(("traceparent", traceparent),))
    seen = responses[0].preview.data.decode()
    assert seen.split("-")[1] == traceparent.split("-")[1]
    assert seen.split("-")[2] != traceparent.split("-")[2]


# ---- Admission -------------------------------------------------------------------------------------


async def test_full_replica_says_so(served: StageProcess) -> None:
    calls = [await begin(served, "wait", request_id=f"r{index}") for index in range(3)]
    error = await failure(served.stub, start_message("steps", request_id="r9"))
    assert isinstance(error, Overloaded) and error.retry_after_s > 0
    calls[0].cancel()
    await served.until_figure("lightloom_in_flight", 2)
    assert await run_call(served.stub, start_message("steps", request_id="r9"))
    for call in calls[1:]:
        call.cancel()


async def test_what_was_taken_away_from_its_owner_is_released(served: StageProcess) -> None:
    async def release(fence: int, request_id: str = "taken") -> None:
        context = types_pb2.RequestContext(request_id=request_id, fence=fence)
        await served.stub.Release(dit_pb2.ReleaseRequest(context=context), timeout=10)

    call = await begin(served, "wait", request_id="taken", fence=5)
    await release(5)
    await served.until_figure("lightloom_rank_jobs", 1)
    await release(6, "taken by nobody")
    await release(6)
    assert isinstance(await error_of(call), StaleFence)
    assert isinstance(await failure(served.stub, start_message("steps", request_id="taken", fence=5)), StaleFence)
    await served.until_figure("lightloom_rank_jobs", 0)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await release(1, "")
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_an_old_owner_is_refused_and_a_new_one_takes_over(served: StageProcess) -> None:
    older = await begin(served, "wait", request_id="owned", fence=5)
    newer = await begin(served, "wait", request_id="owned", fence=6)
    assert isinstance(await error_of(older), StaleFence)
    assert isinstance(await failure(served.stub, start_message("steps", request_id="owned", fence=4)), StaleFence)
    assert len(await run_call(served.stub, start_message("steps", request_id="another", fence=1))) == 2
    await served.until_figure("lightloom_rank_jobs", 1)
    newer.cancel()


async def test_cancel_and_deadline_reach_the_rank(own: StageProcess) -> None:
    call = await begin(own, "wait")
    call.cancel()
    await own.until_figure("lightloom_rank_cancelled_total", 1)
    late = await failure(own.stub, start_message("wait"), timeout=0.3)
    assert isinstance(late, DeadlineExceeded)
    await own.until_figure("lightloom_rank_cancelled_total", 2)
    await own.until_figure("lightloom_in_flight", 0)
    assert await own.figure("lightloom_rank_jobs") == 0


# ---- Back-pressure ---------------------------------------------------------------------------------


def resident_bytes(pid: int) -> int:
    return psutil.Process(pid).memory_info().rss


async def test_a_slow_reader_holds_the_rank_back(own: StageProcess) -> None:
    call = own.stub.Denoise(timeout=60)
    front, rank = own.process.pid, await own.rank_pid()
    before = resident_bytes(front), resident_bytes(rank)
    await call.write(start_message("flood", steps=200))
    await call.done_writing()
    await asyncio.sleep(1.5)
    grown = resident_bytes(front) - before[0], resident_bytes(rank) - before[1]
    assert max(grown) < 80 * MIB, grown
    count = 0
    while (response := await call.read()) is not grpc.aio.EOF:
        count += len(response.frame.chunk.data)
    assert count == 200 * MIB


async def test_a_busy_rank_holds_the_caller_back(own: StageProcess) -> None:
    rank = own.process.pid, await own.rank_pid()
    before = [resident_bytes(pid) for pid in rank]
    large = frames({"x": torch.zeros(300 * MIB, dtype=torch.uint8)})
    blocker = asyncio.create_task(run_call(own.stub, start_message("sleep", request_id="r0", steps=25)))
    await asyncio.sleep(0.2)
    upload = asyncio.create_task(run_call(own.stub, start_message("steps", request_id="r1"), *large))
    await asyncio.sleep(1.2)
    assert not upload.done()
    grown = [resident_bytes(pid) - size for pid, size in zip(rank, before, strict=True)]
    assert grown[0] < 80 * MIB and grown[1] < 160 * MIB, grown
    assert await blocker and await upload


async def test_a_caller_that_never_reads_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "STALL_LIMIT_S", 0.5)
    ready = asyncio.Event()
    config = StageConfig(service=ServiceSection(port=0), model=ModelSection(name="fake", source="none"))
    group = RankGroup(config, "tests.cluster.fake_rank", ready.set)
    supervisor = asyncio.create_task(group.supervise())
    await asyncio.wait_for(ready.wait(), 30)
    calls = []
    for prompt in ("flood", "steps"):
        calls.append(call := group.open(OpenCall("Denoise", prompt)))
        await call.send(start_message(prompt, steps=100).SerializeToString())
        call.half_close()
    silent, other = calls
    for _ in range(101):
        assert await asyncio.wait_for(other.receive(), 10)
    received = 0
    with pytest.raises(Cancelled, match="did not read"):
        while message := await silent.receive():
            received += len(message)
    # It ignores that its caller has no room.
    assert 32 * MIB < received < 40 * MIB
    group.stop()
    await supervisor


# ---- Failure ---------------------------------------------------------------------------------------


async def test_rank_death_ends_calls_and_the_rank_comes_back(own: StageProcess) -> None:
    call = await begin(own, "wait")
    first_pid = await own.rank_pid()
    os.kill(first_pid, signal.SIGKILL)
    assert isinstance(await error_of(call), DeviceLost)
    assert isinstance(await failure(own.stub, start_message("steps")), NotReady)
    assert await own.health() == "NOT_SERVING"
    await own.until("SERVING")
    assert await own.rank_pid() != first_pid
    assert await own.figure("lightloom_rank_restarts_total") == 1
    assert len(await run_call(own.stub, start_message("steps"))) == 2


async def test_a_hanging_rank_is_killed_and_health_answers_meanwhile(tmp_path: Path) -> None:
    async with stage(tmp_path, hang_timeout_s=1.5) as served:
        hanging = asyncio.create_task(failure(served.stub, start_message("hang")))
        await asyncio.sleep(0.5)
        asked_s = time.monotonic()
        assert await served.health() == "SERVING"
        assert (await served.describe()).in_flight == 1
        assert time.monotonic() - asked_s < 1.0
        assert isinstance(await hanging, DeviceLost)
        await served.until("SERVING")


async def test_a_rank_that_fails_to_start_again_is_tried_again(tmp_path: Path) -> None:
    async with stage(tmp_path, preset="crash at second start") as served:
        os.kill(await served.rank_pid(), signal.SIGKILL)
        await served.until("NOT_SERVING")
        await served.until("SERVING")
        assert (tmp_path / "marker").read_text() == "4"


async def test_the_rank_dies_with_its_front(own: StageProcess) -> None:
    rank = psutil.Process(await own.rank_pid())
    own.process.kill()
    await own.process.wait()
    gone, _ = await asyncio.to_thread(psutil.wait_procs, [rank], 5)
    assert gone


# ---- Start and end ---------------------------------------------------------------------------------


async def test_not_serving_until_ready(tmp_path: Path) -> None:
    starting = StageProcess(tmp_path, preset="slow")
    await starting.start()
    try:
        await starting.until("NOT_SERVING")
        assert isinstance(await failure(starting.stub, start_message("steps")), NotReady)
        with pytest.raises(grpc.RpcError) as caught:
            await starting.describe()
        assert isinstance(error_from_rpc(caught.value), NotReady)
        await starting.until("SERVING")
    finally:
        await starting.stop()


@pytest.mark.parametrize(
    ("preset", "service", "words"),
    [
        ("no weights", {}, "model folder nowhere has no weights"),
        ("crash", {}, "signal 9"),
        ("", {"max_in_flight": "many"}, "service.max_in_flight must be of type int"),
        ("", {"speed": 1}, "unknown config key service.speed"),
    ],
)
async def test_what_cannot_start_says_why(tmp_path: Path, preset: str, service: dict[str, object], words: str) -> None:
    broken = StageProcess(tmp_path, preset=preset, **service)
    await broken.start()
    assert await broken.exit_code() == 2
    assert words in broken.last_line() and "Traceback" not in broken.log.read_text()
    await broken.stop()


@pytest.mark.parametrize("which", ["port", "metrics_port"])
async def test_a_port_in_use_is_named(tmp_path: Path, which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        broken = StageProcess(tmp_path, **{which: port})
        await broken.start()
        assert await broken.exit_code() == 2
        assert str(port) in broken.last_line()
        await broken.stop()


async def test_sigterm_lets_running_calls_end(own: StageProcess) -> None:
    responses = aiter(own.stub.Denoise(iter([start_message("steps", steps=40)]), timeout=30))
    await anext(responses)
    own.process.send_signal(signal.SIGTERM)
    await own.until("NOT_SERVING", 5)
    assert (await own.describe()).draining
    assert isinstance(await failure(own.stub, start_message("steps", request_id="r2")), NotReady)
    assert len([response async for response in responses]) == 40
    assert await own.exit_code(5) == 0


async def test_sigterm_while_starting_ends_at_once(tmp_path: Path) -> None:
    starting = StageProcess(tmp_path, preset="never")
    await starting.start()
    await starting.until("NOT_SERVING")
    starting.process.send_signal(signal.SIGTERM)
    assert await starting.exit_code(5) == 0
    await starting.stop()


async def test_sigterm_does_not_wait_for_ever(tmp_path: Path) -> None:
    async with stage(tmp_path, drain_timeout_s=0.5) as served:
        call = await begin(served, "wait")
        rank = psutil.Process(await served.rank_pid())
        served.process.send_signal(signal.SIGTERM)
        error = await error_of(call)
        assert isinstance(error, DeviceLost | NotReady | Cancelled) and error.retryable
        assert await served.exit_code(5) == 0
        assert not rank.is_running()


async def test_every_log_line_is_json(served: StageProcess) -> None:
    await run_call(served.stub, start_message("steps", request_id="r-logged"))
    lines = [json.loads(line) for line in served.log.read_text().splitlines()]
    [ended] = [line for line in lines if line["message"] == "call ended" and line.get("request_id") == "r-logged"]
    assert (ended["outcome"], ended["method"]) == ("ok", "Denoise")
    assert {"time", "level", "process", "trace_id"} <= set(ended)


async def test_a_frozen_front_is_noticed(own: StageProcess) -> None:
    async with connect(f"127.0.0.1:{own.port}", keepalive_s=1.0) as channel:
        call = dit_pb2_grpc.DitStub(channel).Denoise(timeout=30)
        await call.write(start_message("wait"))
        await call.read()
        own.process.send_signal(signal.SIGSTOP)
        frozen_s = time.monotonic()
        assert isinstance(await error_of(call), DeviceLost)
        assert time.monotonic() - frozen_s < 10
