"""Every family in every layout: checkpoints that go on there and elsewhere, sizes side by side, aborts, previews."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dit_svc.engine import DenoiseJob
from dit_svc.preview import PreviewFit
from services.weights import open_source
from tests.oracle.harness import CPU, difference, run
from tests.parallel.jobs import Report, Script, previews_of
from tests.parallel.test_layouts import CUTS, FOUR, NAMES, TWO, share_of, world_of

LAYOUTS = TWO | {name: FOUR[name] for name in ("tensor-cfg", "ulysses-ring", "pipeline-cfg", "hsdp-ulysses")}
# A request goes through all of them, a step in each.
ROUTE = [{}, *(LAYOUTS[name] for name in ("ulysses", "tensor", "pipeline-cfg", "ring", "hsdp", "ulysses-ring", "cfg"))]
BY_WORLD = {world: {name: layout for name, layout in LAYOUTS.items() if world_of(layout) == world} for world in (2, 4)}

# A family may have more variants than layouts of so many ranks: then a variant has none.
SHARES = [(name, world) for name in NAMES for world in BY_WORLD if share_of(name, BY_WORLD[world])]


def denoise_each(pool, subject, runs: list[tuple[dict[str, int], Script]]) -> list[tuple[Report, ...]]:
    """Reports by rank, for every run; all runs take as many ranks."""
    [world] = {world_of(parallel) for parallel, _ in runs}
    return list(zip(*pool.run("denoise_each", world, str(subject.folder), runs, {"max_batch": 8}), strict=True))


def denoise(pool, subject, parallel: dict[str, int], script: Script) -> tuple[Report, ...]:
    [reports] = denoise_each(pool, subject, [(parallel, script)])
    return reports


@pytest.mark.parametrize(("name", "world"), SHARES)
def test_a_checkpoint_goes_on_bit_for_bit_in_its_own_layout(pool, prepared, name, world):
    subject, layouts = prepared(name), list(share_of(name, BY_WORLD[world]).values())
    [job], _ = subject.jobs(1)
    whole, stopped = list(Script([job]) for _ in layouts), []
    for parallel in layouts:
        # After two steps. Behind a pipeline, where a step takes several ticks, the third one is under way.
        moment = 3 * parallel.get("pipeline_parallel_size", 1) - 1
        stopped.append(Script([job], checkpoint={"r0": moment}))
    first = denoise_each(pool, subject, [*zip(layouts, whole, strict=True), *zip(layouts, stopped, strict=True)])
    checkpoints = [reports[0].checkpoints["r0"] for reports in first[len(layouts) :]]
    assert [int(checkpoint.attributes["step"]) for checkpoint in checkpoints] == [2] * len(layouts)
    resumed = [Script([replace(job, checkpoint=checkpoint)]) for checkpoint in checkpoints]
    second = denoise_each(pool, subject, list(zip(layouts, resumed, strict=True)))
    for before, after in zip(first, second, strict=False):
        for expected, report in zip(before, after, strict=True):
            assert torch.equal(report.finished["r0"]["latents"], expected.finished["r0"]["latents"])
            assert report.live_tensors == 0


@pytest.mark.parametrize("name", CUTS)
def test_a_request_goes_on_in_other_layouts(pool, prepared, name):
    """A step in each layout of the route; every checkpoint, and the end, are those of one process.

    A checkpoint knows no layout. What variants with the same blocks differ in, their conditions, is not in it.
    """
    subject = prepared(name)
    [job], stock = subject.jobs_of(replace(subject.row.wishes[0], steps=len(ROUTE)))
    alone = subject.subject.engine(branches="auto")
    alone.admit(job)
    for step, parallel in enumerate(ROUTE, 1):
        alone.tick()
        if step == len(ROUTE):
            break
        ticks = parallel.get("pipeline_parallel_size", 1)
        reports = denoise(pool, subject, parallel, Script([job], checkpoint={"r0": ticks}))
        checkpoint = reports[0].checkpoints["r0"]
        assert int(checkpoint.attributes["step"]) == step
        job = replace(job, checkpoint=checkpoint)
        assert all(report.live_tensors == 0 for report in reports)
    for report in denoise(pool, subject, ROUTE[-1], Script([job])):
        assert difference(report.finished["r0"], stock["r0"]) <= 1e-4


@pytest.mark.parametrize(("name", "world"), SHARES)
def test_sizes_and_previews_side_by_side_and_an_abort_between_them(pool, prepared, name, world):
    """Previews, of the first one, show what one process shows."""
    subject = prepared(name)
    jobs, stock = subject.jobs_of(*subject.row.wishes)
    jobs[0] = with_previews(subject, jobs[0])
    expected = previews_alone(subject, jobs[0])
    assert len(expected) == (jobs[0].params.steps - 1) // 2
    assert max(np.ptp(pixels) for pixels in expected) > 50
    runs = [(parallel, Script(jobs, abort={"r1": 5})) for parallel in share_of(name, BY_WORLD[world]).values()]
    for reports in denoise_each(pool, subject, runs):
        for report in reports:
            assert report.finished.keys() == {"r0", "r2"}
            assert report.live_tensors == 0
            for request_id, tensors in report.finished.items():
                assert difference(tensors, stock[request_id]) <= 1e-4
            shown = [picture(data) for data in report.previews["r0"]]
            for ours, theirs in zip(shown, expected, strict=True):
                assert np.abs(ours - theirs).max() <= 4


def with_previews(subject, job: DenoiseJob) -> DenoiseJob:
    """A preview after every second step, by a random fit from latents to colours."""
    part = subject.subject.family.vae
    channels, *_ = part.latent_geometry(part.load(open_source(str(subject.folder)), CPU, torch.float32))
    weight = torch.randn(channels, 3, generator=torch.Generator().manual_seed(0)) / 4
    fit = PreviewFit(weight, torch.full((3,), 0.5))
    return replace(job, params=replace(job.params, preview_every=2), preview_fit=fit)


def previews_alone(subject, job: DenoiseJob) -> list[np.ndarray]:
    """What one process shows."""
    engine, events = subject.subject.engine(branches="auto"), []
    engine.admit(job)
    run(engine, events)
    return [picture(data) for data in previews_of(events)["r0"]]


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


@pytest.mark.parametrize("layout", ["ulysses", "pipeline", "pipeline-cfg"])
def test_an_abort_at_any_moment_frees_all_ranks_and_leaves_others_alone(pool, prepared, layout):
    subject, parallel = prepared("wan-t2v"), LAYOUTS[layout]
    jobs, stock = subject.jobs(2)
    runs = [(parallel, Script(jobs, abort={"r1": moment})) for moment in range(1, 7)]
    for reports in denoise_each(pool, subject, runs):
        for report in reports:
            assert report.finished.keys() == {"r0"}
            assert difference(report.finished["r0"], stock["r0"]) <= 1e-4
            assert report.live_tensors == 0


@pytest.mark.parametrize(("high", "low"), [("pipeline", "tensor"), ("hsdp", "pipeline"), ("cfg", "ulysses")])
def test_groups_of_one_expert_each_hand_requests_on(pool, prepared, high, low):
    """From one layout to another; behind a pipeline, other requests are under way when one comes to the boundary."""
    subject = prepared("wan-t2v")
    jobs, stock = subject.jobs_of(*subject.row.wishes)

    def reports(layout: str, expert: str, admitted: list[DenoiseJob]) -> list[Report]:
        arguments = str(subject.folder), LAYOUTS[layout], {"max_batch": 8, "expert": expert}, Script(admitted)
        return pool.run("denoise", 2, *arguments)

    for report in reports(high, "high_noise", jobs):
        assert report.checkpoints.keys() == stock.keys() and not report.finished and report.live_tensors == 0
    onward = [replace(job, checkpoint=report.checkpoints[job.request_id]) for job in jobs]
    for report in reports(low, "low_noise", onward):
        assert report.finished.keys() == stock.keys() and report.live_tensors == 0
        assert all(difference(report.finished[name], expected) <= 1e-4 for name, expected in stock.items())
