"""A VAE on two ranks as real processes: frames leave chunk by chunk, aborts, a dead rank."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import torch

from protos import text_encoder_pb2, types_pb2, vae_pb2, vae_pb2_grpc
from services.clip_writer import encode_frames
from services.families import load_family
from services.rank_group import STALL_LIMIT_S
from services.request import GenerationParams, Media, ResolvedParams, resolve
from services.tensor_wire import frame_of
from services.tensors import BundleReader, bundle_frames
from services.weights import open_source
from services.wire import params_to_proto
from tests.cluster.stage_process import StageProcess, stage
from vae_svc.engine import VaeChunk, VaeEngine, VaeJob

FAMILY = load_family("wan")
MODES = {"exact": {}, "tiles": {"engine.tile_px": 32, "parallel.vae_patch_mode": "tiles"}}
SIDE_PX = 512
LATENTS = {"latents": torch.randn(1, 16, 4, 11, 8, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    FAMILY.tiny(folder, "vace", 0)
    return folder


def params(**changes: object) -> ResolvedParams:
    wish = GenerationParams(model="fake", prompt="a", width=64, height=96, num_frames=13, steps=2)
    return replace(resolve(wish, FAMILY.variants["vace"].limits.without_inputs(), seed=0), **{"height": 88, **changes})


def frames_alone(folder: Path) -> np.ndarray:
    """What one rank makes of whole pictures."""
    with torch.inference_mode():
        vae = FAMILY.vae.load(open_source(str(folder)), torch.device("cpu"), torch.float32)
        engine = VaeEngine(FAMILY.vae, vae, 1)
        engine.submit(VaeJob("a", params(), LATENTS))
        chunks = []
        while engine.busy:
            chunks += [event.frames for event in engine.tick() if isinstance(event, VaeChunk)]
    return np.concatenate(chunks)


def ranks_of(running: StageProcess) -> list[psutil.Process]:
    return sorted(psutil.Process(running.process.pid).children(), key=lambda process: process.pid)


@pytest.fixture(params=MODES)
async def group(request, tiny, tmp_path) -> AsyncIterator[tuple[str, StageProcess]]:
    settings = {
        "model.source": str(tiny),
        "model.device": "cpu",
        "parallel.vae_patch_parallel_size": 2,
        "limits.size_multiple_px": 8,
        **MODES[request.param],
    }
    options = {"module": "vae_svc", "serves": "Vae", "settings": settings}
    async with stage(tmp_path, start_timeout_s=90.0, **options) as running:
        yield request.param, running


def decode(
    running: StageProcess,
    name: str,
    *,
    frames_only: bool = True,
    wish: ResolvedParams | None = None,
    latents: dict[str, torch.Tensor] = LATENTS,
):
    context = types_pb2.RequestContext(request_id=name, fence=1)
    start = vae_pb2.DecodeStart(context=context, params=params_to_proto(wish or params()), frames_only=frames_only)
    messages = [vae_pb2.DecodeRequest(start=start), *map(vae_pb2.DecodeRequest.FromString, bundle_frames(latents))]
    return vae_pb2_grpc.VaeStub(running.channel).Decode(iter(messages), timeout=60)


@pytest.mark.parametrize("ranks", [1, 2])
async def test_a_clip_whose_frames_nobody_takes_holds_up_no_other(tiny, tmp_path, ranks):
    settings = {"model.source": str(tiny), "model.device": "cpu", "parallel.vae_patch_parallel_size": ranks}
    options = {"module": "vae_svc", "serves": "Vae", "settings": settings | {"limits.size_multiple_px": 8}}

    def begin(name: str, frames: int):
        wish = params(width=SIDE_PX, height=SIDE_PX, num_frames=frames)
        latents = {"latents": torch.randn(1, 16, (frames - 1) // 4 + 1, SIDE_PX // 8, SIDE_PX // 8)}
        return decode(running, name, wish=wish, latents=latents)

    async with stage(tmp_path, start_timeout_s=90.0, **options) as running:
        # The frames of one have 13 MiB, more than a call has room for, of the other 76, more than all queues together.
        stuck, left = begin("stuck", 17), begin("left", 97)
        taken = aiter(stuck)
        first = await anext(taken)
        await left.read()
        # Not only once the front has given up on it.
        async with asyncio.timeout(STALL_LIMIT_S):
            assert len(await chunks_of(decode(running, "other"))) == 4
            media = [response async for response in decode(running, "clip", frames_only=False)]
            assert media[4].media.num_frames == 13
        # Who takes frames again gets the rest; who leaves gives back its place.
        left.cancel()
        await running.until_figure("lightloom_in_flight", 1)
        assert sum(map(len, await chunks_of(taken, first))) == 17
        await running.until_figure("lightloom_in_flight", 0)


async def test_a_chunk_larger_than_all_queues_holds_up_no_other(tiny, tmp_path):
    options = {"module": "tests.cluster.fake_vae_stage", "serves": "Vae", "settings": {"model.source": str(tiny)}}
    # Its chunks of frames are no Wan VAE's.
    options["settings"] |= {"limits.frame_multiple": 1, "limits.size_multiple_px": 8}
    # 37 MiB in one chunk, more than a front keeps of a call.
    wish = params(width=1792, height=1792, num_frames=4, output_format="raw")
    latents = {"latents": torch.zeros(1, 3)}
    async with stage(tmp_path, start_timeout_s=90.0, **options) as running:
        raw = aiter(decode(running, "raw", frames_only=False, wish=wish, latents=latents))
        frames = aiter(decode(running, "frames", wish=wish, latents=latents))
        header, first = await anext(raw), await anext(frames)
        async with asyncio.timeout(STALL_LIMIT_S):
            assert sum(map(len, await chunks_of(decode(running, "other", latents=latents)))) == 13
        rest = asyncio.create_task(chunks_of(frames, first))
        assert header.media.nbytes == sum([len(response.chunk.data) async for response in raw])
        assert [chunk.shape for chunk in await rest] == [(4, 1792, 1792, 3)]


async def chunks_of(call, *read: vae_pb2.DecodeResponse) -> list[np.ndarray]:
    """Chunks of frames, after those messages that have been read."""
    reader, chunks = BundleReader(), []
    for response in [*read, *[response async for response in call]]:
        if (frame := frame_of(response.SerializeToString())) is not None and (bundle := reader.feed(frame)) is not None:
            chunks.append(bundle.tensors["frames"].numpy())
    return chunks


async def what_makes_no_sense_is_refused(running: StageProcess) -> None:
    """On all ranks alike: no group ends of it."""
    wishes = {"num_frames": 0, "fps": math.nan, "quality": 1000, "output_format": "wav", "width": 0}
    for name, value in wishes.items():
        await refused(running, params(**{name: value}))
    await refused(running, params(fps=0.001, output_format="gif"))
    await refused(running, params(), b"\xff\xff\xff garbage")
    assert await running.figure("lightloom_rank_restarts_total") == 0


async def refused(running: StageProcess, wish: ResolvedParams, *behind: bytes) -> None:
    context = types_pb2.RequestContext(request_id="refused", fence=1)
    start = vae_pb2.DecodeRequest(start=vae_pb2.DecodeStart(context=context, params=params_to_proto(wish)))
    call = running.channel.stream_stream("/lightloom.v1.Vae/Decode")(
        iter([start.SerializeToString(), *behind]), timeout=60
    )
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in call:
            """It may have begun."""
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()


async def a_reader_that_is_killed_fails_its_encode_on_all_ranks(running: StageProcess) -> None:
    """Rank 0 alone reads clips, and others hear from it what became of them."""
    encoding = asyncio.create_task(encode(running, "killed"))
    first, second = ranks_of(running)
    async with asyncio.timeout(20):
        while not (readers := first.children()):
            assert not encoding.done()
            await asyncio.sleep(0.005)
    assert second.children() == []
    for reader in readers:
        reader.kill()
    with pytest.raises(grpc.RpcError, match="the process that reads an input clip was killed") as caught:
        async with asyncio.timeout(10):
            await encoding
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(await chunks_of(decode(running, "next"))) == 4
    assert await encode(running, "read")


async def encode(running: StageProcess, name: str) -> list[text_encoder_pb2.EncodeResponse]:
    """Of a clip that steers another one."""
    clip = Media(*encode_frames(np.zeros((13, 88, 64, 3), np.uint8), "mp4", 90, 16.0), "video")
    context = types_pb2.RequestContext(request_id=name, fence=1)
    request = text_encoder_pb2.EncodeRequest(context=context, params=params_to_proto(params(inputs=(clip,))))
    return [response async for response in vae_pb2_grpc.VaeStub(running.channel).Encode(request, timeout=60)]


async def test_two_ranks_give_the_frames_of_one_chunk_by_chunk(group, tiny):
    mode, running = group
    assert len(ranks_of(running)) == 2
    chunks = await chunks_of(decode(running, "whole"))
    assert [len(chunk) for chunk in chunks] == [1, 4, 4, 4]
    alone = frames_alone(tiny)
    apart = np.abs(np.concatenate(chunks).astype(int) - alone.astype(int))
    # Whole pictures: a value may round to its neighbour. Tiles see less at their edges.
    assert apart.max() <= 1 if mode == "exact" else apart.mean() < 30
    media = [response async for response in decode(running, "clip", frames_only=False)]
    assert [response.frames for response in media[:4]] == [1, 5, 9, 13]
    header, data = media[4].media, b"".join(response.chunk.data for response in media)
    assert (header.mime, header.num_frames, header.nbytes) == ("video/mp4", 13, len(data))

    await what_makes_no_sense_is_refused(running)
    await a_reader_that_is_killed_fails_its_encode_on_all_ranks(running)

    # A client that leaves in the middle of its clip leaves nothing behind.
    left = decode(running, "left")
    await left.read()
    left.cancel()
    await running.until_figure("lightloom_in_flight", 0)
    assert len(await chunks_of(decode(running, "after"))) == 4

    old = ranks_of(running)
    old[1].kill()
    with pytest.raises(grpc.RpcError) as caught:
        await chunks_of(decode(running, "unlucky"))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await running.until("SERVING", 60)
    again = await chunks_of(decode(running, "again"))
    assert not {process.pid for process in old} & {process.pid for process in ranks_of(running)}
    assert all(map(np.array_equal, again, chunks))
