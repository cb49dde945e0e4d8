"""The interpolation service as real processes, through gRPC: clips in, media out, and what is refused."""

from __future__ import annotations

import asyncio
import io
import signal
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import av
import grpc
import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
from PIL import Image
from safetensors.torch import save_file

from interpolation_svc.clip import Clip
from interpolation_svc.ifnet import IFNet, IFNetSpec
from interpolation_svc.weights import load_ifnet
from protos import interpolation_pb2, interpolation_pb2_grpc, types_pb2, vae_pb2
from services.client import error_from_rpc
from services.clip_bundles import messages_of
from services.errors import CorruptTensor, DeviceLost, InvalidRequest, ServiceError, StaleFence
from services.request import ResolvedParams
from services.sound import Sound
from services.tensor_wire import WHOLE_BYTES
from services.tensors import bundle_frames
from services.wire import params_to_proto
from tests.cluster.stage_process import StageProcess, stage

HEIGHT, WIDTH = 48, 64
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    torch.manual_seed(0)
    save_file(IFNet(IFNetSpec((16, 12, 8, 8), encodes=True)).state_dict(), path)
    return path


def options(weights: Path, **settings: object) -> dict[str, object]:
    changes = {"model.source": str(weights), "model.device": "cpu", "model.threads": 1, **settings}
    return {"module": "interpolation_svc", "serves": "Interpolation", "settings": changes, "max_in_flight": 3}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[StageProcess]:
    folder = tmp_path_factory.mktemp("stage")
    async with stage(folder, start_timeout_s=60, **options(weights, **{"limits.max_frames": 700})) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def served(shared: StageProcess) -> AsyncIterator[StageProcess]:
    yield shared
    await shared.until_figure("lightloom_in_flight", 0)
    await shared.until_figure("lightloom_rank_interpolation_clips", 0)
    assert await shared.figure("lightloom_rank_restarts_total") == 0


def scene(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    wide = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH + count), mode="bilinear")[0].permute(1, 2, 0)
    return torch.stack([(255 * wide[:, i : i + WIDTH]).to(torch.uint8) for i in range(count)])


Messages = Iterator[interpolation_pb2.InterpolateRequest]


def start(count: int, *, exponent: int = 1, scale: float = 1.0, fence: int = 1, **wishes: object) -> Messages:
    values = {"width": WIDTH, "height": HEIGHT, "fps": 12.0, "output_format": "raw"} | wishes
    params = ResolvedParams(
        **{"model": "any", "prompt": "p", "negative_prompt": "", "num_frames": count, "steps": 1, "guidance": 1.0}
        | {"guidance_2": 1.0, "seed": 0, "quality": 90, "preview_every": 0}
        | values
    )
    yield interpolation_pb2.InterpolateRequest(
        start=interpolation_pb2.InterpolateStart(
            context=types_pb2.RequestContext(request_id="r1", fence=fence),
            params=params_to_proto(params),
            exponent=exponent,
            scale=scale,
            num_frames=count,
        )
    )


def sent(frames: torch.Tensor, *sizes: int) -> Messages:
    for some in frames.split(list(sizes) or [len(frames)]):
        yield from map(interpolation_pb2.InterpolateRequest.FromString, bundle_frames({"frames": some}))


def whole(**tensors: torch.Tensor) -> Messages:
    """A bundle as one message: what a call is refused with can be lost to another that is written just then."""
    for message in bundle_frames(tensors, whole_bytes=WHOLE_BYTES):
        yield interpolation_pb2.InterpolateRequest.FromString(message)


async def answer(running: StageProcess, *parts: Messages) -> list[vae_pb2.DecodeResponse]:
    """What comes behind the counts of frames. Raises ServiceError."""
    call = interpolation_pb2_grpc.InterpolationStub(running.channel).Interpolate(
        (message for part in parts for message in part), timeout=30
    )
    try:
        responses = [response async for response in call]
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error
    counts = [response.frames for response in responses if response.WhichOneof("kind") == "frames"]
    assert counts == sorted(set(counts)) and not any(response.frames for response in responses[len(counts) :])
    assert counts[-1] == responses[len(counts)].media.num_frames
    return responses[len(counts) :]


async def refusal(running: StageProcess, *parts: Messages) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await answer(running, *parts)
    return caught.value


def media_of(responses: list[vae_pb2.DecodeResponse]) -> bytes:
    return b"".join(response.chunk.data for response in responses)


async def test_what_it_says_of_itself(served: StageProcess) -> None:
    stub = interpolation_pb2_grpc.InterpolationStub(served.channel)
    facts = await stub.Describe(types_pb2.DescribeRequest(), timeout=5)
    assert facts.stage == types_pb2.STAGE_INTERPOLATION
    assert (list(facts.models), facts.device, facts.dtype, facts.max_in_flight) == ([], "cpu", "float32", 3)
    assert facts.component_id.startswith("interpolation-")
    limits = facts.interpolation_limits
    assert (limits.max_exp, limits.min_scale, limits.max_scale, limits.max_frames) == (4, 0.25, 4.0, 700)


@pytest.mark.parametrize(("exponent", "scale", "sizes"), [(1, 1.0, ()), (2, 0.5, (1, 2, 2)), (3, 2.0, (4, 1))])
async def test_frames_come_back_with_others_between(
    served: StageProcess, weights: Path, exponent: int, scale: float, sizes: tuple[int, ...]
) -> None:
    frames = scene(5)
    header, *rest, usage = await answer(served, start(5, exponent=exponent, scale=scale), sent(frames, *sizes))
    count = 4 * 2**exponent + 1
    assert (header.media.num_frames, header.media.fps) == (count, 12.0 * 2**exponent)
    assert (header.media.width, header.media.height) == (WIDTH, HEIGHT)
    assert usage.usage.busy_s > 0 and usage.usage.spans[0].name == "interpolate"
    pixels = np.frombuffer(media_of(rest), np.uint8).reshape(count, HEIGHT, WIDTH, 3)
    assert header.media.nbytes == pixels.nbytes
    assert np.array_equal(pixels[:: 2**exponent], frames.numpy())
    with torch.inference_mode():
        here = torch.cat(list(Clip(load_ifnet(weights), exponent, scale, 8).add(frames)))
    assert np.abs(pixels.astype(int) - here.numpy().astype(int)).max() <= 1


async def test_a_gif_and_a_zip_have_every_frame_at_the_new_rate(served: StageProcess) -> None:
    responses = await answer(served, start(9, exponent=2, output_format="gif"), sent(scene(9), 1, 4, 4))
    assert (responses[0].media.mime, responses[0].media.num_frames, responses[0].media.fps) == ("image/gif", 33, 48.0)
    with Image.open(io.BytesIO(media_of(responses))) as image:
        durations_ms = [(image.seek(index), image.info["duration"])[1] for index in range(image.n_frames)]
        assert (len(durations_ms), sum(durations_ms)) == (33, round(100 * 33 / 48) * 10)
    responses = await answer(served, start(9, exponent=2, output_format="zip"), sent(scene(9), 1, 4, 4))
    with zipfile.ZipFile(io.BytesIO(media_of(responses))) as archive:
        pictures = [np.asarray(Image.open(archive.open(name))) for name in archive.namelist()]
    assert np.array_equal(np.stack(pictures)[::4], scene(9).numpy())
    error = await refusal(served, start(9, exponent=3, output_format="gif"))
    said = "fps of a gif, 8 times 12.0, is 96.0: it must be between 1.0 and 50.0"
    assert (error.param, said in error.message) == ("fps", True)


async def test_an_mp4_has_every_frame_at_the_new_rate_and_the_sound(served: StageProcess) -> None:
    sound = Sound(np.zeros((2, 24000), np.float32), 48000)
    pieces = [message for some in scene(9).split([1, 8]) for message in messages_of(some.numpy(), sound)]
    messages = map(interpolation_pb2.InterpolateRequest.FromString, pieces)
    responses = await answer(served, start(9, exponent=2, output_format="mp4"), messages)
    assert responses[0].media.mime == "video/mp4"
    with av.open(io.BytesIO(media_of(responses))) as container:
        stream = container.streams.video[0]
        assert sum(1 for _ in container.decode(stream)) == 33
        assert (float(stream.average_rate), stream.width, stream.height) == (48.0, WIDTH, HEIGHT)
        [heard] = container.streams.audio
        assert (heard.rate, heard.layout.nb_channels) == (48000, 2)
        assert float(heard.duration * heard.time_base) == pytest.approx(33 / 48, abs=0.002)


@pytest.mark.parametrize(
    ("wishes", "param", "says"),
    [
        ({"exponent": 0}, "frame_interpolation_exp", "between 1 and 4"),
        ({"exponent": 31}, "frame_interpolation_exp", "between 1 and 4"),
        ({"scale": 0.1}, "frame_interpolation_scale", "between 0.25 and 4.0"),
        ({"scale": float("nan")}, "frame_interpolation_scale", "between 0.25 and 4.0"),
        ({"fps": 0.0}, "fps", "between 1.0 and 120.0"),
        ({"quality": 101}, "quality", "between 1 and 100"),
        ({"width": 63}, "width", "must be even"),
        ({"height": 0}, "height", "at least 16"),
        ({"width": 65536, "height": 65536}, "width", "at most 9437184 can be interpolated"),
        ({"count": 81, "exponent": 4}, "frame_interpolation_exp", "at most 700"),
        ({"count": 0}, "num_frames", "one frame at least"),
        ({"output_format": "png"}, "output_format", "use one of mp4, webp, gif, zip, raw"),
    ],
    ids=str,
)
async def test_what_is_not_allowed_is_refused_with_what_is(
    served: StageProcess, wishes: dict[str, object], param: str, says: str
) -> None:
    error = await refusal(served, start(**{"count": 5, **wishes}))
    assert isinstance(error, InvalidRequest)
    assert error.param == param and says in error.message


async def test_other_frames_than_announced_are_refused(served: StageProcess) -> None:
    frames = scene(5)
    cases: dict[str, tuple[Messages, ...]] = {
        "must start with a context": (whole(frames=frames),),
        "before all frames had come": (start(5), whole(frames=frames[:4])),
        "6 frames came, 5 were announced": (start(5), whole(frames=scene(6))),
        "they must be uint8": (start(5), whole(frames=frames[:, 2:])),
        "they must be uint8, ": (start(5), whole(frames=frames.float())),
        "has the tensors frames, others": (start(5), whole(frames=frames, others=frames)),
    }
    for says, parts in cases.items():
        error = await refusal(served, *parts)
        assert isinstance(error, CorruptTensor | InvalidRequest) and says in error.message, (says, error)
    error = await refusal(served, start(5), start(5))
    assert isinstance(error, InvalidRequest) and "two starts" in error.message


async def test_an_abort_ends_the_work(served: StageProcess) -> None:
    stub = interpolation_pb2_grpc.InterpolationStub(served.channel)
    call = stub.Interpolate(iter([*start(81, exponent=3), *sent(scene(81))]), timeout=30)
    reading = asyncio.create_task(call.read())
    await served.until_figure("lightloom_rank_interpolation_clips", 1)
    call.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    # The fixture waits until nothing of it is left.


async def test_a_newer_owner_takes_over(served: StageProcess) -> None:
    stub = interpolation_pb2_grpc.InterpolationStub(served.channel)
    older = stub.Interpolate(timeout=30)
    await older.write(next(start(2, fence=11)))
    await served.until_figure("lightloom_in_flight", 1)
    assert len(await answer(served, start(2, fence=12), sent(scene(2)))) == 3
    with pytest.raises(grpc.RpcError) as ended:
        await older.read()
    assert isinstance(error_from_rpc(ended.value), StaleFence)
    assert isinstance(await refusal(served, start(2, fence=11)), StaleFence)


async def test_a_dead_rank_ends_its_calls_and_comes_again(weights: Path, tmp_path: Path) -> None:
    async with stage(tmp_path, start_timeout_s=60, **options(weights)) as running:
        stub = interpolation_pb2_grpc.InterpolationStub(running.channel)
        call = stub.Interpolate(timeout=60)
        await call.write(next(start(2)))
        await running.until_figure("lightloom_rank_interpolation_clips", 1)
        [rank] = psutil.Process(running.process.pid).children()
        rank.send_signal(signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as ended:
            await call.read()
        assert isinstance(error_from_rpc(ended.value), DeviceLost)
        await running.until("SERVING", 60)
        assert len(await answer(running, start(2, fence=2), sent(scene(2)))) == 3


async def test_without_weights_it_says_what_it_wants(tmp_path: Path) -> None:
    running = StageProcess(tmp_path, **options(tmp_path / "absent.safetensors"))
    await running.start()
    assert await running.exit_code(60) == 2
    assert "absent.safetensors do not exist" in running.log.read_text()
    await running.stop()
