"""The interpolator's engine on a small random network: which frames come out, in what turns, and what it keeps."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from interpolation_svc.clip import Clip
from interpolation_svc.cuts import CUT_BELOW, cuts, thumbnails
from interpolation_svc.engine import InterpolationChunk, InterpolationEngine, InterpolationJob, InterpolationResult
from interpolation_svc.ifnet import IFNet, IFNetSpec
from services.errors import CorruptTensor, NonFinite

HEIGHT, WIDTH = 50, 70


@pytest.fixture(scope="module")
def net() -> IFNet:
    torch.manual_seed(0)
    return IFNet(IFNetSpec((16, 12, 8, 8), encodes=True)).eval().requires_grad_(False)


def scene(count: int, seed: int = 0) -> torch.Tensor:
    """A coarse pattern that moves a pixel a frame: [F, H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    wide = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH + count), mode="bilinear")[0].permute(1, 2, 0)
    return torch.stack([(255 * wide[:, i : i + WIDTH]).to(torch.uint8) for i in range(count)])


def interpolated(
    net: IFNet, frames: torch.Tensor, exponent: int, *, scale: float = 1.0, batch: int = 8
) -> torch.Tensor:
    return torch.cat(list(Clip(net, exponent, scale, batch).add(frames)))


@pytest.mark.parametrize("exponent", [1, 2, 3, 5])
def test_every_frame_is_kept_and_between_two_come_others(net: IFNet, exponent: int) -> None:
    frames = scene(5)
    out = interpolated(net, frames, exponent)
    steps = 2**exponent
    assert out.shape == (4 * steps + 1, HEIGHT, WIDTH, 3)
    assert torch.equal(out[::steps], frames)
    # Each moment is asked for by itself: one between the same two frames, however many there are.
    assert torch.equal(out[steps // 2 :: steps], interpolated(net, frames, 1)[1::2])
    middle = out[1:steps].flatten(1)
    assert not (middle == frames[0].flatten()).all(1).any()


@pytest.mark.parametrize("parts", [[9], [1] * 9, [1, 4, 4], [2, 3, 4]], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_chunks_and_batches_change_nothing(net: IFNet, parts: list[int], batch: int) -> None:
    frames, clip = scene(9), Clip(net, 2, 0.5, batch)
    chunks = [chunk for some in frames.split(parts) for chunk in clip.add(some)]
    assert max(map(len, chunks)) <= batch
    apart = torch.cat(chunks).int() - interpolated(net, frames, 2, scale=0.5, batch=33).int()
    assert apart.abs().max() <= 1


def test_one_frame_stays_one(net: IFNet) -> None:
    assert torch.equal(interpolated(net, scene(1), 3), scene(1))


@pytest.mark.parametrize("exponent", [1, 2])
def test_across_a_cut_frames_stand_longer(net: IFNet, exponent: int) -> None:
    first, second, steps = scene(3), scene(3, seed=7), 2**exponent
    out = interpolated(net, torch.cat([first, second]), exponent)
    across = out[2 * steps : 3 * steps + 1]
    assert all(torch.equal(frame, first[2]) for frame in across[: steps // 2 + 1])
    assert all(torch.equal(frame, second[0]) for frame in across[steps // 2 + 1 :])
    assert torch.equal(out[: 2 * steps + 1], interpolated(net, first, exponent))
    assert torch.equal(out[3 * steps :], interpolated(net, second, exponent))


def test_what_is_a_cut() -> None:
    def pictures(frames: torch.Tensor) -> torch.Tensor:
        return thumbnails(frames.permute(0, 3, 1, 2) / 255)

    moving = pictures(scene(9))
    assert not cuts(moving[:-4], moving[4:]).any()
    others = torch.cat([pictures(scene(1, seed)) for seed in range(1, 20)])
    assert cuts(others[:-1], others[1:]).float().mean() > 0.8
    dim, dark = pictures(scene(1) // 2), torch.zeros(1, 1, 32, 32)
    assert not cuts(moving[:1], dim).any(), "a fade is none"
    assert not cuts(dark, dark + 0.02).any(), "flat pictures are alike"
    assert 0.23 < CUT_BELOW < 0.4


def bytes_alive() -> int:
    return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is torch.Tensor)


def test_memory_does_not_grow_with_the_clip(net: IFNet) -> None:
    def peak(count: int) -> int:
        clip, most = Clip(net, 2, 1.0, 4), 0
        for index in range(count):
            for chunk in clip.add(scene(1, seed=index // 8)):
                del chunk
                most = max(most, bytes_alive())
        return most

    few = peak(8)
    # A frame has 2 % of it.
    assert peak(24) < 1.02 * few


def results(engine: InterpolationEngine) -> Iterator[InterpolationChunk | InterpolationResult]:
    while engine.busy:
        yield from engine.tick()


def job(name: str, count: int, exponent: int = 1) -> InterpolationJob:
    return InterpolationJob(name, WIDTH, HEIGHT, count, exponent, 1.0)


def test_clips_take_turns_and_come_out_as_alone(net: IFNet) -> None:
    engine = InterpolationEngine(net, 2)
    clips = {"long": scene(9), "short": scene(2, seed=1)}
    out: dict[str, list[torch.Tensor]] = {name: [] for name in clips}
    ended = []
    for name, frames in clips.items():
        engine.submit(job(name, len(frames)))
        engine.add(name, frames)
    for event in results(engine):
        if isinstance(event, InterpolationChunk):
            out[event.job.request_id].append(event.frames)
        else:
            assert event.error is None and event.busy_s > 0
            ended.append(event.job.request_id)
    assert ended == ["short", "long"], "the short one does not wait for the long one"
    for name, frames in clips.items():
        assert torch.equal(torch.cat(out[name]), interpolated(net, frames, 1, batch=2))
    assert engine.metrics() == {"interpolation_clips": 0, "interpolation_waiting_bytes": 0}


def test_while_nobody_takes_a_clips_frames_others_go_on(net: IFNet) -> None:
    engine = InterpolationEngine(net, 8)
    for name in ("stuck", "other"):
        engine.submit(job(name, 3))
        engine.add(name, scene(3))
    events = [event for _ in range(4) for event in engine.tick({"stuck"})]
    assert {event.job.request_id for event in events} == {"other"}
    assert isinstance(events[-1], InterpolationResult)
    assert engine.busy and engine.tick({"stuck"}) == []
    assert isinstance(list(results(engine))[-1], InterpolationResult)


def test_a_clip_ends_when_its_last_frame_has_come(net: IFNet) -> None:
    engine = InterpolationEngine(net, 8)
    engine.submit(job("a", 3))
    engine.add("a", scene(3)[:2])
    assert not any(isinstance(event, InterpolationResult) for event in results(engine))
    assert not engine.whole("a")
    engine.add("a", scene(3)[2:])
    assert isinstance(list(results(engine))[-1], InterpolationResult)
    assert engine.whole("a")


def test_other_frames_than_announced_are_refused(net: IFNet) -> None:
    engine = InterpolationEngine(net, 8)
    engine.submit(job("a", 2))
    for frames in (scene(2).float(), scene(2)[:, :-1], scene(2)[..., :2], scene(2)[0]):
        with pytest.raises(CorruptTensor, match=r"must be uint8, \[F, 50, 70, 3\]"):
            engine.add("a", frames)
    with pytest.raises(CorruptTensor, match="3 frames came, 2 were announced"):
        engine.add("a", scene(3))
    with pytest.raises(CorruptTensor, match="0 frames came"):
        engine.add("a", scene(2)[:0])


def test_an_abort_forgets_everything(net: IFNet) -> None:
    engine = InterpolationEngine(net, 1)
    engine.submit(job("a", 9))
    engine.add("a", scene(9))
    engine.tick()
    engine.abort("a")
    assert not engine.busy and engine.tick() == []
    engine.add("a", scene(1))
    assert engine.waiting_bytes == 0


def test_numbers_that_overflow_fail_their_clip_only(net: IFNet) -> None:
    torch.manual_seed(0)
    broken = IFNet(net.spec).eval()
    torch.nn.init.constant_(broken.block3.lastconv[0].bias, float("nan"))
    engine = InterpolationEngine(broken, 8)
    engine.submit(job("a", 2))
    engine.add("a", scene(2))
    engine.submit(job("b", 1))
    engine.add("b", scene(1))
    ends = {event.job.request_id: event.error for event in results(engine) if isinstance(event, InterpolationResult)}
    assert isinstance(ends["a"], NonFinite)
    assert ends["b"] is None
